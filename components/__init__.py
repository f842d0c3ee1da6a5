"""One thin Kubeflow component a stage: import one function of the package, call it, log the headline numbers.

The package is in the image, so nothing is installed when a pod starts. What a component returns is small: URIs travel as
strings, weights by the package's own store, and an artifact is never pointed at a place of ours (KFP would copy it).
"""

from functools import partial

from kfp import dsl

from camopd import __version__

IMAGE = f"ghcr.io/camopd/core:{__version__}"

component = partial(dsl.component, base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
