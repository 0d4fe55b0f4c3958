"""What distpatch does on one GPU, or several, in one command: ``python -m benchmarks.gpu`` (docs/gpu.md).

Needs torch and the standard library alone. Ranks that are threads are those of the tests (``tests/threads.py`` and
``tests/late.py``, which need no more); nothing else is shared with the tests.
"""
