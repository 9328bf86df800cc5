"""DiffBIR at a reduced width, in its authors' file layouts; `make` made ``keys.json`` and ``expected.safetensors``."""
