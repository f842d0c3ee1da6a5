"""One thin Kubeflow component a stage: import one function of the package, call it, log the headline numbers.

The package is in the image, so nothing is installed when a pod starts: without torch for a ``component``, with it for a
``model_component``. What a component returns is small: URIs travel as
strings, weights by the package's own store, and an artifact is never pointed at a place of ours (KFP would copy it).
"""

from functools import partial

from kfp import dsl

from camopd import __version__

CORE, TRAINER = (f"ghcr.io/camopd/{name}:{__version__}" for name in ("core", "trainer"))

component = partial(dsl.component, base_image=CORE, packages_to_install=[], install_kfp_package=False)
model_component = partial(dsl.component, base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
