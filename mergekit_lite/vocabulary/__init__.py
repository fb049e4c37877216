"""Vocabularies: tokenizers read and united, and which row of which model each token's row comes from. No torch."""
