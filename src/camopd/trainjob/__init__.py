"""A round's updates on several nodes: as a TrainJob of Kubeflow Trainer, launched, followed and cleaned up by the train step.

``spec`` says what the object holds and is pure, ``cluster`` is the one file that talks to Kubernetes, ``follow`` decides.
"""

from camopd.trainjob.follow import launch_and_follow
from camopd.trainjob.spec import JobSpec, job_name, render

__all__ = ["JobSpec", "job_name", "launch_and_follow", "render"]
