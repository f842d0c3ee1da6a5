"""Two accounts: runs have the cloud's identity, hooks have nothing."""

from tests.helm.conftest import NAMED, one


def test_runs_carry_the_cloud_identity_and_hooks_do_not(helm):
    objects = helm.render(
        NAMED["full"]
        | {"serviceAccount": NAMED["full"]["serviceAccount"] | {"labels": {"azure.workload.identity/use": "true"}}}
    )
    runs, hooks = one(objects, "ServiceAccount", "camopd"), one(objects, "ServiceAccount", "camopd-sync")
    assert runs["metadata"]["annotations"]["eks.amazonaws.com/role-arn"] == "arn:aws:iam::111122223333:role/camopd"
    assert runs["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    assert hooks["metadata"]["annotations"] == {"contact": "nlp@example.com"}
    assert (runs["automountServiceAccountToken"], hooks["automountServiceAccountToken"]) == (True, False)


def test_an_account_may_have_another_name(helm):
    objects = helm.render({"serviceAccount": {"name": "runner"}, "sync": {"serviceAccount": {"name": "syncer"}}})
    assert one(objects, "ServiceAccount", "runner")
    assert one(objects, "ServiceAccount", "syncer")
    assert one(objects, "RoleBinding", "camopd")["subjects"][0]["name"] == "runner"
    assert one(objects, "Job", "camopd-sync")["spec"]["template"]["spec"]["serviceAccountName"] == "syncer"
