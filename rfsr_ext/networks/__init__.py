"""Networks that diffusers and transformers do not have, and the key names of files older than those libraries."""
