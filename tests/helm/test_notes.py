"""What `helm install` tells at its end: the next commands, and what is missing."""

from tests.helm.conftest import NAMED


def test_the_next_commands_are_those_of_this_release(helm):
    notes = helm.notes()
    assert "helm test nightly --namespace ml --logs" in notes
    assert "kubectl --namespace ml logs job/nightly-camopd-sync" in notes
    assert "port-forward service/ml-pipeline-ui" in notes
    assert "KFP_HOST=http://localhost:8080 camopd submit medical-8b --watch" in notes


def test_what_is_not_set_is_told(helm):
    assert "No output is set" in helm.notes()
    assert "No mlflow.trackingUri is set" in helm.notes()
    notes = helm.notes(NAMED["full"])
    assert "No " not in notes
    assert "2 schedule(s)" in notes
    assert "https://kfp.example" in notes


def test_without_a_sync_it_says_how_to_do_it_by_hand(helm):
    notes = helm.notes({"sync": {"enabled": False}})
    assert "get configmap nightly-camopd" in notes
    assert "camopd sync sync.json" in notes
