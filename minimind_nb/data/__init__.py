"""Text becomes ids: tokenizers, validated rows, the token cache, packed batches."""
