"""CaMOPD: give a domain model its lost general ability back, and keep the domain (arXiv:2605.27115)."""

__version__ = "0.1.0"
