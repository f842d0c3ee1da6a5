"""A recipe's text and values: where it lies, what people typed, and how to tell them what is wrong."""
