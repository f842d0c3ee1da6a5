"""The rights that the chart gives, beside those that are asked for."""

from typing import Any

import pytest

from camopd.trainjob import follow
from tests.helm.conftest import NAMED, one, rights
from tests.trainjob.conftest import api, round_uri, train  # noqa: F401 (fixtures)
from tests.trainjob.jobs import finishing

GROUPS = {"trainjobs": "trainer.kubeflow.org", "pods": "", "pods/log": "", "events": ""}
NODES = {"pools": {"training": {"nodes": 2, "runtime": "torch-distributed"}}}


def test_a_run_may_do_what_driver_launcher_and_argo_ask_for_and_no_more(helm):
    assert rights(one(helm.render(), "Role", "camopd")) == {
        ("argoproj.io", "workflowtaskresults", "", "create"),
        ("argoproj.io", "workflowtaskresults", "", "patch"),
        ("", "pods", "", "get"),
        ("", "configmaps", "kfp-launcher", "get"),
        ("", "secrets", "mlpipeline-minio-artifact", "get"),
    }


def test_several_nodes_add_exactly_what_the_train_step_asks_for(helm, api, train, round_uri, monkeypatch):  # noqa: F811
    monkeypatch.setattr(follow, "PENDING", 0.0)
    done = finishing(api, round_uri)
    api.looks = [lambda: None, lambda: None, lambda: done(next(iter(api.jobs.values())))]  # no pods at first: why? events
    train()
    asked = {(GROUPS[resource], resource, "", verb) for verb, resource in api.asked}
    added = rights(one(helm.render(NODES), "Role", "camopd")) - rights(one(helm.render(), "Role", "camopd"))
    assert added == asked
    assert {verb for verb, resource in api.asked if resource == "trainjobs"} == {"create", "get", "delete"}


def test_the_hooks_have_rights_on_pipelines_where_there_are_users_and_none_elsewhere(helm):
    group = "pipelines.kubeflow.org"
    wanted = {
        "pipelines": ("create", "list"),
        "experiments": ("create", "list"),
        "jobs": ("create", "list", "enable", "disable", "delete"),
        "runs": ("list",),
    }
    role = one(helm.render({"kfp": {"multiUser": True}}), "Role", "camopd-sync")
    assert rights(role) == {(group, resource, "", verb) for resource, verbs in wanted.items() for verb in verbs}
    assert [entry["metadata"]["name"] for entry in helm.render() if entry["kind"] == "Role"] == ["camopd"]


@pytest.mark.parametrize("name", [name for name in NAMED if name != "small"])
def test_a_binding_gives_a_role_that_is_there_to_the_account_that_uses_it(helm, name):
    objects = helm.render(NAMED[name])
    for binding in (entry for entry in objects if entry["kind"] == "RoleBinding"):
        assert one(objects, "Role", binding["roleRef"]["name"])
        (subject,) = binding["subjects"]
        assert (subject["kind"], subject["namespace"]) == ("ServiceAccount", "ml")
        assert one(objects, "ServiceAccount", subject["name"])


def test_an_account_that_is_there_already_is_given_the_role(helm):
    objects = helm.render({"serviceAccount": {"create": False, "name": "default-editor"}})
    assert one(objects, "RoleBinding", "camopd")["subjects"][0]["name"] == "default-editor"
    assert [entry["metadata"]["name"] for entry in objects if entry["kind"] == "ServiceAccount"] == ["camopd-sync"]


def test_kubeflow_s_own_account_and_a_cluster_with_its_own_rules_are_left_alone(helm):
    assert not [entry for entry in helm.render({"serviceAccount": {"create": False}}) if entry["kind"].startswith("Role")]
    assert not [entry for entry in helm.render(NAMED["full"] | {"rbac": {"create": False}}) if entry["kind"].startswith("Role")]


def test_more_rules_and_other_secrets_are_added(helm):
    rule: dict[str, Any] = {"apiGroups": [""], "resources": ["services"], "verbs": ["get"]}
    role = one(helm.render({"rbac": {"launcherSecrets": [], "extraRules": [rule]}}), "Role", "camopd")
    assert ("", "services", "", "get") in rights(role)
    assert not [right for right in rights(role) if right[1] == "secrets"]


def test_no_rule_is_a_wildcard(helm):
    for name, values in NAMED.items():
        for entry in helm.render(values):
            assert "*" not in str(entry.get("rules", "")), name
