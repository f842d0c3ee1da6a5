"""The recovery as one Kubeflow pipeline: the graph, its compiled form, and how one machine runs it."""
