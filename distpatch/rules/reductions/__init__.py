"""Sums, norms, extrema, scans and losses: partial results merged over ranks."""

from distpatch.rules.reductions import extrema as extrema
from distpatch.rules.reductions import losses as losses
from distpatch.rules.reductions import normalization as normalization
from distpatch.rules.reductions import reduction as reduction
from distpatch.rules.reductions import scans as scans
from distpatch.rules.reductions import sorting as sorting
from distpatch.rules.reductions import sync_batch_norm as sync_batch_norm
