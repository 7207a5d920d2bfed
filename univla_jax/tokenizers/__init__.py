"""From files and pixels to discrete codes: text, image and action tokenizers, one vocabulary."""
