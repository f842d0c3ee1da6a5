"""Locations: the spellings of case 07 and of the same kinds, and what holds for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from camopd.store.uris import check_uri, is_s3, join, parent

CASE = Path(__file__).parent / "cases" / "07-s3-compatible-endpoint"

# What becomes of each line of the case: the normalised form, or the words of the refusal.
EXPECTED = {
    "s3://models/domain-a": "s3://models/domain-a",
    "s3://models/domain-a/": "s3://models/domain-a",
    "s3://models//domain-a": ValueError("empty path part"),
    "s3://models": ValueError("needs a key prefix"),
    "s3://models/": ValueError("needs a key prefix"),
    "s3a://models/domain-a": "s3://models/domain-a",
    "S3://models/domain-a": "s3://models/domain-a",
    "s3://my.dotted.bucket/x": "s3://my.dotted.bucket/x",
    "s3://models/réseau d'huile/v1+2/prompts.jsonl": "s3://models/réseau d'huile/v1+2/prompts.jsonl",
    "s3://models/with%20percent/x.jsonl": "s3://models/with%20percent/x.jsonl",
    "s3://models/domain-a?endpoint=x": ValueError("carries a query"),
    "https://objectstore.storage.svc/models/domain-a": ValueError("is a web address.*AWS_ENDPOINT_URL_S3=https://host"),
    "models/domain-a": ValueError("has no scheme; write s3://models/domain-a for an object store or ./models/domain-a"),
    " s3://models/domain-a ": ValueError("blanks around it"),
    "": ValueError("is empty"),
}


def test_each_line_of_the_case_has_its_expectation() -> None:
    assert (CASE / "uris.txt").read_text(encoding="utf-8").splitlines() == list(EXPECTED)


@pytest.mark.parametrize(("text", "expected"), EXPECTED.items())
def test_lines_of_the_case(text: str, expected: str | ValueError) -> None:
    if isinstance(expected, ValueError):
        with pytest.raises(ValueError, match=str(expected)):
            check_uri(text)
    else:
        assert check_uri(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("   ", "is empty"),
        ("s3://models/a\n", "blanks around"),
        ("\u00a0s3://models/a", "blanks around"),
        ("s3://models/a\nb", "control character"),
        ("./a\x00b", "control character"),
        ("s3://models/a\udc80", "control character"),
        ("s3://models/domain-a//", "empty path part"),
        ("s3:///models/a", "no valid bucket"),
        ("s3://models//", "needs a key prefix|empty path part"),
        ("s3://models/a#part", "query or a fragment"),
        ("s3://models/../secrets/a", "does not resolve"),
        ("s3://models/./a", "does not resolve"),
        ("s3://models/a\\b", "separator is /"),
        ("s3://models/" + "é" * 513, "1026 bytes"),
        ("s3://Models/a", "no valid bucket"),
        ("s3://my..bucket/a", "no valid bucket"),
        ("s3://10.0.0.1/models/a", "no valid bucket"),
        ("s3://minio:9000/models/a", "no valid bucket.*AWS_ENDPOINT_URL_S3"),
        ("s3:/models/a", "write s3://models/a"),
        ("s3:models/a", "write s3://models/a"),
        ("S3A:/models/a", "write s3://models/a"),
        ("arn:aws:s3:::models/a", "write s3://models/a"),
        ("arn:aws-cn:s3:::models/a", "write s3://models/a"),
        ("s3n://models/a", "not understood"),
        ("gs://models/a", "not understood"),
        ("hf://org/model", "not understood"),
        ("\ufeffs3://models/a", "not understood"),
        ("http://minio:9000/models/a", "AWS_ENDPOINT_URL_S3=http://host"),
        ("file://models/a", "three slashes"),
        ("file:/models/a", "three slashes"),
        ("C:\\models\\a", "has no scheme"),
    ],
)
def test_other_members_of_the_same_kinds_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_uri(text)


@pytest.mark.parametrize(
    "text", ["s3://AKIAKEY:hidden@models/a", "https://user:hidden@host/a", "https://h/a?X-Amz-Signature=hidden"]
)
def test_a_refusal_repeats_no_secret(text: str) -> None:
    with pytest.raises(ValueError, match=r"\.\.\.") as refusal:
        check_uri(text)
    assert "hidden" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/", "/"),
        ("/data/a/", "/data/a"),
        ("./a", "./a"),
        ("../a//", "../a"),
        ("~/a", "~/a"),
        (".", "."),
        ("./", "."),
        ("file:///data/a%20b/", "/data/a%20b"),
        ("FILE:///data", "/data"),
    ],
)
def test_local_paths(text: str, path: str) -> None:
    assert check_uri(text) == path


parts = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/\\?#"), min_size=1, max_size=20).filter(
    lambda part: part == part.strip() and part not in (".", "..")
)
roots = st.sampled_from(["s3://models/run", "s3://my.dotted.bucket/x y", "/data/run", "./run", "../run", "~/run"])


@given(roots, st.lists(parts, min_size=1, max_size=4))
@example("s3://models/run", ["~"])
def test_joined_locations_are_accepted_as_they_are_and_come_apart_again(root: str, names: list[str]) -> None:
    uri = join(root, *names)
    assert check_uri(uri) == check_uri(check_uri(uri)) == check_uri(uri + "/") == uri
    assert is_s3(uri) == is_s3(root)
    for _ in names:
        uri = parent(uri)
    assert uri == root


@given(st.text(max_size=40))
def test_a_location_is_refused_or_normalised_once_and_for_all(text: str) -> None:
    try:
        uri = check_uri(text)
    except ValueError:
        return
    assert check_uri(uri) == uri


@pytest.mark.parametrize(
    ("uri", "above"),
    [("s3://b/run", "s3://b"), ("/a", "/"), ("a", "."), ("./a", "."), (".", "./.."), ("..", "../.."), ("/a/b/", "/a")],
)
def test_parent_at_the_ends(uri: str, above: str) -> None:
    assert parent(uri) == above


@pytest.mark.parametrize("uri", ["/", "s3://bucket"])
def test_nothing_is_above_a_root(uri: str) -> None:
    with pytest.raises(ValueError, match="nothing above"):
        parent(uri)
