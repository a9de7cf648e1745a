"""A recipe as a user may write it, and what errors tell about recipes."""

from __future__ import annotations

GOOD = """\
# A short line about it.
version: 1
name: try
family: vit
task: image-classification
data: {source: digits}
parents:
  - name: a
    from: some/model
  - name: b
    weight: 2
    train:
      config: {hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4,
               intermediate_size: 128, patch_size: 2}
      epochs: 3
target:
  hidden_size: 0.5
"""
