"""How the shipped mini model, rewards and judge are made: ``rfsr mini build``."""
