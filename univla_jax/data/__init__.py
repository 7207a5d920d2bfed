"""Robot corpora in, token store out."""
