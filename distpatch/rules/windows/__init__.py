"""Windows that slide over the rows: convolution, pooling, resizing, padding, unfold."""

from distpatch.rules.windows import adaptive as adaptive
from distpatch.rules.windows import convolution as convolution
from distpatch.rules.windows import grid_sample as grid_sample
from distpatch.rules.windows import pad as pad
from distpatch.rules.windows import pooling as pooling
from distpatch.rules.windows import resize as resize
from distpatch.rules.windows import transposed as transposed
from distpatch.rules.windows import unfold as unfold
