"""mergekit's recipes, read unchanged into the same `Recipe` that the native language gives.

document.py     YAML nodes -> documents: slices of sources with their parameters, still as written
reference.py    `path@revision+lora` -> which checkpoint is meant
vocabulary.py   tokenizer_source, tokenizer, chat_template
language.py     mergekit's methods: parameters, defaults, and what they are called here
parameter.py    numbers, gradients, filters -> `Value`
recipe.py       documents -> steps
experts.py      mergekit-moe's language: one document, still as written
mixture.py      that -> a step `moe`, and which hidden states it needs
"""

from mergekit_lite.recipe.mergekit.document import is_mergekit
from mergekit_lite.recipe.mergekit.mixture import Wanted, wanted_states
from mergekit_lite.recipe.mergekit.recipe import read_mergekit

__all__ = ["Wanted", "is_mergekit", "read_mergekit", "wanted_states"]
