"""What goes in and comes out in each format, against the models as `gendist.load` returns them."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from served import serving

import gendist
from gendist.data import Schema
from gendist.serve.arrow_messages import Messages, is_compressed, stream_of
from gendist.serve.formats import format_of
from gendist.serve.http_app import http_app
from gendist.serve.limits import Limits
from gendist.serve.media_types import MEDIA_TYPES
from gendist.serve.problems import Problem
from gendist.serve.rows import RowReader, array_of_npy, table_of_arrow

FAMILIES = ["labelled_gmm", "gmm", "hmm", "naive_bayes", "labelled_vae", "vae_of_images", "gan"]
SEED, NUM = 2**64 - 1, 70


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def ipc(table: pa.Table, new=pa.ipc.new_stream, **options) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def sampled(server, name, format_, **body):
    answer = server.post(f"/models/{name}/sample", params={"format": format_}, json={"num_samples": NUM, "seed": SEED, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPES[format_]
    assert answer.headers["x-gendist-seed"] == str(SEED)
    return answer


def texts(x, schema):
    """x with the texts that entries are indices of."""
    known = [schema.categories.get(name) for name in schema.feature_names]
    return [[k[int(v)] if k else v for v, k in zip(row, known, strict=True)] for row in x.tolist()]


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture
def expected(name, artifacts):
    return np.asarray(gendist.load(artifacts[name]).sample(NUM, seed=SEED), dtype=np.float64)


def labels_of(name, artifacts):
    model = gendist.load(artifacts[name])
    if not (model.labels and hasattr(model, "sample_classes")):
        return None
    return [model.labels[c] for c in model.sample_classes(NUM, seed=SEED).tolist()]


def test_a_sample_as_json(server, hosted, name, expected, artifacts):
    content = sampled(server, name, "json").json()
    facts = {"model": name, "digest": hosted[name].digest, "seed": SEED, "offset": 0, "num_samples": NUM}
    assert {key: content[key] for key in facts} == facts
    schema = hosted[name].artifact.schema
    assert content["columns"] == list(schema.feature_names)
    assert content["x"] == (texts(expected, schema) if schema.categories else expected.tolist())
    assert content.get("label") == labels_of(name, artifacts)
    assert ("state" in content) == (name == "hmm")


def test_a_sample_as_npy(server, name, expected):
    assert sampled(server, name, "npy").content == npy(expected)


def test_a_sample_as_npz(server, name, expected, artifacts):
    arrays = np.load(io.BytesIO(sampled(server, name, "npz").content), allow_pickle=False)
    assert arrays["x"].tobytes() == expected.tobytes()
    assert arrays["x"].shape == expected.shape
    labels = labels_of(name, artifacts)
    assert (arrays["label"].tolist() if "label" in arrays else None) == labels
    if name == "hmm":
        assert np.array_equal(arrays["state"], gendist.load(artifacts[name]).sample_states(NUM, seed=SEED))


@pytest.mark.parametrize("format_", ["arrow", "ndjson"])
def test_a_sample_as_a_table_is_what_gendist_sample_writes(server, name, artifacts, tmp_path, format_):
    import pyarrow.parquet as pq

    from gendist.bulk import sample

    sample(artifacts[name], NUM, tmp_path / "x.parquet", seed=SEED)
    written = pq.read_table(tmp_path / "x.parquet")
    content = sampled(server, name, format_).content
    if format_ == "arrow":
        assert pa.ipc.open_stream(content).read_all().cast(written.schema).equals(written)
    else:
        assert [json.loads(line) for line in content.splitlines()] == written.to_pylist()


@pytest.mark.parametrize("name", ["gmm", "hmm", "vae_of_images"])
def test_a_sample_as_a_picture(server, name):
    image = Image.open(io.BytesIO(sampled(server, name, "png").content))
    image.load()
    assert min(image.size) > 100


def test_what_a_sample_writes_can_be_asked_about(server, name, artifacts):
    """Every format that is taken, by every verb of rows that the family offers."""
    model, content = gendist.load(artifacts[name]), sampled(server, name, "json").json()["x"]
    bodies = {
        MEDIA_TYPES["npy"]: sampled(server, name, "npy").content,
        MEDIA_TYPES["arrow"]: sampled(server, name, "arrow").content,
    }
    x = np.load(io.BytesIO(bodies[MEDIA_TYPES["npy"]]))
    for verb in {"log_prob", "elbo", "encode", "classify", "impute", "reconstruct"} - set(model.not_offered):
        said = getattr(model, verb)(list(x) if x.ndim == 3 else x)
        expected = [np.asarray(each).tolist() for each in said]
        answer = server.post(f"/models/{name}/{verb}", json={"x": content})
        assert answer.status_code == 200, answer.text
        values = answer.json()[verb]
        if verb in ("impute", "reconstruct") and name == "naive_bayes":
            assert values == content
        else:
            assert values == expected
        for kind, body in bodies.items():
            binary = server.post(f"/models/{name}/{verb}", content=body, headers={"content-type": kind})
            assert binary.json()[verb] == values, (verb, kind)


def test_a_verb_answers_in_every_format(server, artifacts):
    model = gendist.load(artifacts["labelled_vae"])
    x = np.asarray(model.sample(5, seed=1))
    expected = model.classify(x).numpy()
    answers = {
        f: server.post("/models/labelled_vae/classify", params={"format": f}, json={"x": x.tolist()}) for f in MEDIA_TYPES
    }
    assert answers["json"].json()["labels"] == [0, 1, 2]
    assert np.array_equal(np.load(io.BytesIO(answers["npy"].content)), expected)
    assert np.array_equal(np.load(io.BytesIO(answers["npz"].content))["classify"], expected)
    table = pa.ipc.open_stream(answers["arrow"].content).read_all()
    assert table.column_names == ["0", "1", "2"]
    assert np.array_equal(np.stack([column.to_numpy() for column in table.columns], 1), expected)
    assert [list(json.loads(line).values()) for line in answers["ndjson"].content.splitlines()] == expected.tolist()
    assert answers["png"].status_code == 406


def test_rows_by_name_in_any_order_and_null_is_missing(server, artifacts):
    model = gendist.load(artifacts["naive_bayes"])
    rows = [{"size": 1.5, "colour": "red"}, {"colour": None, "size": -2}, {"colour": "no such", "size": None}]
    expected = model.log_prob(np.array([[2.0, 1.5], [np.nan, -2.0], [3.0, np.nan]])).tolist()
    assert server.post("/models/naive_bayes/log_prob", json={"x": rows}).json()["log_prob"] == expected
    filled = server.post("/models/naive_bayes/impute", json={"x": rows[1:2]}).json()["impute"]
    assert filled[0][0] in ("blue", "green", "red")
    assert filled[0][1] == -2.0


def test_sequences_of_different_lengths(server, artifacts):
    model = gendist.load(artifacts["hmm"])
    sequences = [np.asarray(model.sample(1, seed=s, length=length))[0] for s, length in enumerate((3, 1, 4))]
    body = {"x": [each.tolist() for each in sequences]}
    assert server.post("/models/hmm/log_prob", json=body).json()["log_prob"] == model.log_prob(sequences).tolist()
    encoded = [each.tolist() for each in model.encode(sequences)]
    assert server.post("/models/hmm/encode", json=body).json()["encode"] == encoded
    table = pa.ipc.open_stream(server.post("/models/hmm/encode?format=arrow", json=body).content).read_all()
    assert table.column("sequence").to_pylist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert table.column("step").to_pylist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert server.post("/models/hmm/encode?format=npy", json=body).status_code == 406
    of_lists = pa.table({name: pa.array([each[:, i].tolist() for each in sequences]) for i, name in enumerate("ab")})
    arrow = {"content": ipc(of_lists), "headers": {"content-type": MEDIA_TYPES["arrow"]}}
    assert server.post("/models/hmm/encode", **arrow).json()["encode"] == encoded


def test_steps_beside_features_of_their_names(alike):
    x = [[[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]], [[7.5, 8.5, 9.5]]]
    names = ["sequence of the sample", "step of the sequence", "sequence", "step", "state"]
    rows = [[0, 0, *x[0][0]], [0, 1, *x[0][1]], [1, 0, *x[1][0]]]
    with serving(http_app(alike)) as server:
        table = server.post("/models/steps/impute?format=arrow", json={"x": x}).content
        assert pa.ipc.open_stream(table).read_all().to_pylist() == [dict(zip(names, row, strict=True)) for row in rows]
        lines = server.post("/models/steps/impute?format=ndjson", json={"x": x}).content.splitlines()
        assert [json.loads(line) for line in lines] == [dict(zip(names, row, strict=True)) for row in rows]
        # As what `gendist sample` writes is read by `gendist score`, by the names of the columns.
        back = server.post("/models/steps/impute", content=table, headers={"content-type": MEDIA_TYPES["arrow"]})
        assert back.json()["impute"] == x


def test_images_as_they_are_and_flat(server, artifacts):
    x = np.asarray(gendist.load(artifacts["vae_of_images"]).sample(3, seed=1))
    flat, images = ({"x": each.tolist()} for each in (x, x.reshape(3, 6, 4)))
    answers = [server.post("/models/vae_of_images/encode", json=body).json()["encode"] for body in (flat, images)]
    assert answers[0] == answers[1]
    headers = {"content-type": MEDIA_TYPES["npy"]}
    assert (
        server.post("/models/vae_of_images/encode", content=npy(x.reshape(3, 6, 4)), headers=headers).json()["encode"]
        == answers[0]
    )


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<f2", "<i8", ">i2", "u1", "?", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_type_and_order(dtype, order):
    array = np.asarray(np.arange(6).reshape(2, 3) % 2, dtype=dtype, order=order)
    taken: list[int] = []
    assert np.array_equal(array_of_npy(npy(array), "x", taken.append), array)
    assert sum(taken) == (0 if dtype == "<f8" else 8 * array.size)


def test_npy_that_is_refused():
    whole = npy(np.ones((2, 3)))
    bad = {
        "truncated": whole[:-1],
        "longer": whole + b"0",
        "no magic": b"x" + whole,
        "empty": b"",
        "of objects": npy_of_objects(),
        "of texts": npy(np.array(["a"])),
        "complex": npy(np.ones(2, dtype=complex)),
        "of records": npy(np.zeros(2, dtype=[("a", "f8")])),
        "an enormous shape": whole.replace(b"(2, 3), }         ", b"(2, 3000000000), }"),
        "more sides than an array may have": npy_of((1,) * 100, b"8" * 8),
        "a side longer than any": npy_of((0, 10**30), b""),
        "header of code": whole.replace(b"False", b"exit("),
    }
    for what, body in bad.items():
        with pytest.raises(Problem) as refused:
            array_of_npy(body, "x", int)
        assert refused.value.status in (400, 422), what


def npy_of(shape: tuple[int, ...], content: bytes) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue() + content


def test_npy_of_sequences_without_a_step_is_refused_however_many_there_are(server):
    body = npy_of((2**40, 0, 2), b"")
    answer = server.post("/models/hmm/log_prob", content=body, headers={"content-type": MEDIA_TYPES["npy"]})
    assert answer.status_code == 422
    assert answer.json()["field"] == "x"


def npy_of_objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    return stream.getvalue()


TABLE = pa.table({"a": [1.0, 2.0] * 100, "colour": pa.array(["red", "blue"] * 100).dictionary_encode()})


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_compressed_arrow_is_told_before_it_is_read(new, compression):
    body = ipc(TABLE, new, compression=compression)
    assert is_compressed(stream_of(body)) == (compression is not None)
    if compression is None:
        assert table_of_arrow(body).equals(TABLE)
    else:
        with pytest.raises(Problem, match="compressed"):
            table_of_arrow(body)


@pytest.mark.parametrize("step", [1, 7, 1000, 10**6])
def test_arrow_that_comes_in_parts(step):
    body = ipc(pa.concat_tables([pa.table({"a": [1.0, 2.0], "t": ["x", "yy"]})] * 3))
    messages = Messages()
    got = [batch for start in range(0, len(body), step) for batch in messages.fed(body[start : start + step])]
    assert got == pa.ipc.open_stream(body).read_all().to_batches()
    assert len(got) == 3
    for bad in (b"no Arrow at all", ipc(TABLE), body[:8] + bytes(len(body))):
        with pytest.raises((pa.ArrowException, OSError)):
            list(Messages().fed(bad))


def test_arrow_that_is_refused(server):
    whole = ipc(pa.table({"a": [1.0], "b": [2.0]}))
    headers = {"content-type": MEDIA_TYPES["arrow"]}
    names = "ab"
    bombs = {
        "truncated": whole[: len(whole) // 2],
        "no table": b"nonsense",
        "empty": b"",
        "no rows": ipc(pa.table({"a": pa.array([], pa.float64()), "b": pa.array([], pa.float64())})),
        "a column is missing": ipc(pa.table({"a": [1.0], "c": [2.0]})),
        "texts": ipc(pa.table({name: ["x"] for name in names})),
        "a million rows of nothing": ipc(pa.table({name: pa.nulls(2_000_000) for name in names})),
        "lists of nothing": ipc(pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.nulls(10**9), 10**9)})),
        "images": ipc(pa.table({"x": [b"\x89PNG"]})),
        "infinite": ipc(pa.table({"a": [np.inf], "b": [1.0]})),
    }
    for what, body in bombs.items():
        answer = server.post("/models/gmm/log_prob", content=body, headers=headers)
        assert answer.status_code in (400, 413, 422), (what, answer.text)
        assert answer.json().keys() == {"error", "field", "allowed"}
    more = pa.table({"z": ["unread"], "b": [2.0], "a": [1.0]})
    answers = [
        server.post("/models/gmm/log_prob", content=ipc(each), headers=headers) for each in (more, more.select(["a", "b"]))
    ]
    assert answers[0].json()["log_prob"] == answers[1].json()["log_prob"]


def test_arrow_that_is_far_larger_than_its_body():
    """Sparse rows: of next to no bytes, but of a number for each feature where they are computed."""
    num_rows, width, limits = 200, 1_000, Limits(queue_bytes=1_000_000)
    type_ = pa.struct({"indices": pa.list_(pa.int32()), "values": pa.list_(pa.float64())})
    names = tuple(f"x_{i}" for i in range(width))
    reader = RowReader(Schema(columns=("x",), feature_names=names, is_sparse=True), width, False, limits)
    few, many = (ipc(pa.table({"x": pa.array([{"indices": [1], "values": [2.0]}] * n, type_)})) for n in (2, num_rows))
    taken: list[int] = []
    assert len(many) < limits.queue_bytes < 8 * num_rows * width
    assert np.asarray(reader.of_arrow(few, taken.append)).sum() == 4.0
    with pytest.raises(Problem) as refused:
        reader.of_arrow(many, taken.append)
    assert (refused.value.status, refused.value.field) == (413, "x")
    assert taken == [8 * 2 * width]


def test_the_format_is_what_the_client_likes_best():
    assert format_of(None, None) == format_of(None, "") == format_of(None, " , ") == "json"  # which says nothing
    assert format_of(None, "*/*") == format_of(None, "text/html, */*;q=0.1") == "json"
    assert format_of(None, "application/json;q=0.5, application/x-npy") == "npy"
    assert format_of(None, "image/*") == "png"
    assert format_of(None, "application/json;q=0, */*") == "npy"
    assert format_of(None, "*/*, application/json;q=0.1, application/x-npy;q=0.2") == "npz"
    assert format_of("arrow", "application/json") == "arrow"
    for query, accept in ((None, "text/html"), ("xml", None), (None, "application/json;q=0")):
        with pytest.raises(Problem) as refused:
            format_of(query, accept)
        assert refused.value.status == 406


def test_an_accept_that_is_empty(server):
    answer = server.post("/models/gmm/sample", headers={"accept": ""})
    assert (answer.status_code, answer.headers["content-type"]) == (200, MEDIA_TYPES["json"])


def test_accept_in_several_lines(server):
    headers = [("accept", "application/json;q=0.5"), ("accept", "application/x-npy"), ("accept", "text/html;q=0.9")]
    assert server.post("/models/gmm/sample", headers=headers).headers["content-type"] == MEDIA_TYPES["npy"]


def test_numbers_that_are_not_finite_are_null(server):
    far = server.post("/models/gmm/log_prob", json={"x": [[1e70, 1e70]]})
    assert far.status_code == 200, far.text
    json.loads(far.content, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))


def test_an_archive_says_what_is_in_it(server):
    archive = zipfile.ZipFile(io.BytesIO(sampled(server, "labelled_vae", "npz").content))
    assert archive.namelist() == ["x.npy", "label.npy"]
    assert archive.testzip() is None


def test_the_same_question_is_the_same_bytes(server):
    for format_ in set(MEDIA_TYPES) - {"png"}:
        assert sampled(server, "labelled_vae", format_).content == sampled(server, "labelled_vae", format_).content


def test_latents(server, artifacts):
    model, mixture = gendist.load(artifacts["vae_of_images"]), gendist.load(artifacts["gmm"])
    z = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).numpy()
    decoded = server.post("/models/vae_of_images/decode", json={"z": z.tolist()})
    assert decoded.json()["decode"] == model.decode(z).tolist()
    binary = {"content": npy(z), "headers": {"content-type": MEDIA_TYPES["npy"]}}
    assert server.post("/models/vae_of_images/decode", **binary).json()["decode"] == model.decode(z).tolist()
    assert server.post("/models/gmm/decode", json={"z": [1, 0]}).json()["decode"] == mixture.decode(np.array([1, 0])).tolist()


def test_texts_are_counted_as_they_were_in_the_fit(tmp_path):
    spec = {"family": "naive_bayes", "model": {"kind": "multinomial"}, "data": {"label": "y", "text": {"column": "body"}}}
    bodies = ["red apple", "green apple tree", "fast car", "red fast car"]
    run = gendist.fit({"name": "texts", **spec}, data={"body": bodies, "y": ["fruit", "fruit", "car", "car"]})
    model, reader = run.model, RowReader(run.model.schema, run.model.num_features, False, Limits())
    table = pa.table({"body": ["a green car", "apple apple", "nothing that is known"], "other": [1, 2, 3]})
    x_ND = reader.of_arrow(ipc(table), lambda num_bytes: None)
    torch.testing.assert_close(model.log_prob(x_ND), model.log_prob(table))
    apple = model.feature_names.index("apple")
    assert x_ND[:, apple].tolist() == [0.0, 2.0, 0.0]
