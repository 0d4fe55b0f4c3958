"""What distpatch does on one GPU, or several, in one command: ``python -m benchmarks.gpu`` (docs/gpu.md).

Needs torch and einops alone. Ranks that are threads are those of the tests (``tests/support/threads.py`` and
``tests/support/transports/late.py``, which need no more); nothing else is shared with the tests.
"""
