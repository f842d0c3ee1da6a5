"""Where pods may connect to, when that is asked for."""

from tests.helm.conftest import NAMED, one, pods_in

OURS = {"camopd.io/release": "camopd"}


def test_there_is_none_unless_it_is_wanted(helm):
    assert not [entry for entry in helm.render() if entry["kind"] == "NetworkPolicy"]


def test_it_selects_every_pod_of_the_chart(helm):
    objects = helm.render(NAMED["full"])
    selected = one(objects, "NetworkPolicy", "camopd")["spec"]["podSelector"]["matchLabels"]
    assert selected == OURS  # pods of runs: test_configmap, labels of the pools
    for pod in pods_in(objects).values():
        assert selected.items() <= pod["metadata"]["labels"].items()


def test_what_may_be_reached(helm):
    spec = one(helm.render(NAMED["full"]), "NetworkPolicy", "camopd")["spec"]
    assert spec["policyTypes"] == ["Egress"]
    assert spec["egress"] == [
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
        {"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}}}]},
        {"to": [{"podSelector": {"matchLabels": OURS}}]},
        {
            "to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}],
            "ports": [{"port": 443, "protocol": "TCP"}, {"port": 6443, "protocol": "TCP"}],
        },
        *NAMED["full"]["networkPolicy"]["egress"],
    ]
