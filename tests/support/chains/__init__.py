"""What random chains are made of. Importing this package fills the vocabulary."""

from tests.support.chains import images, shapes, values, writes
from tests.support.chains.vocabulary import FAMILIES, draw_chain

__all__ = ["FAMILIES", "draw_chain", "images", "shapes", "values", "writes"]
