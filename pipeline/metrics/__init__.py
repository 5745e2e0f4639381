"""How good the pictures are: the field's metrics, each with its source, computed over all ranks."""
