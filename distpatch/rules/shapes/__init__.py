"""Dims and rows in another arrangement: views, reshapes, indexing, concatenation, FFT."""

from distpatch.rules.shapes import concatenation as concatenation
from distpatch.rules.shapes import fft as fft
from distpatch.rules.shapes import gather_scatter as gather_scatter
from distpatch.rules.shapes import indexing as indexing
from distpatch.rules.shapes import reshape as reshape
from distpatch.rules.shapes import shape as shape
from distpatch.rules.shapes import slicing as slicing
