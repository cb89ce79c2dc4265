"""
A checkpoint from anywhere: whatever its files hold, nothing in them is run, and who loads it is told in one line.
"""
import io
import json
import os
import pickle
import random
import shutil
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

import parallel
from model import Model
from test_grid import DEEP, PLAN, build, step

CONFIG = replace(DEEP, balance_group=1, num_hidden_layers=2, num_nextn_predict_layers=0)      # small files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of one process after a step."""
    folder = tmp_path_factory.mktemp("ckpt")
    model, _ = build(CONFIG, PLAN)
    optimizer = step(model, None, PLAN, PLAN)[-1]
    saver = parallel.Saver(folder, 1)
    saver.save(parallel.train_state(model, optimizer), dict(step=1, tokens=5, placement=[[1, 2], [3]]))
    saver.wait()
    return folder / "step_1"


@pytest.fixture
def hostile(written, tmp_path):
    shutil.copytree(written, tmp_path / "step_1")
    return tmp_path / "step_1"


def load(folder):
    """As a trainer does: the files, then progress, then everything. -> progress."""
    progress = dict(step=0, tokens=0, placement=[])
    parallel.check_files(folder)
    parallel.load_progress(folder, progress)
    model = Model(CONFIG).double()
    parallel.restore(folder, model, torch.optim.AdamW(parallel.param_groups(model), lr=0.01), progress)
    return progress


def sign(folder):
    """The list of files as who changed them would write it."""
    (folder / parallel.MANIFEST).unlink()
    parallel.write_manifest(folder)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.made = folder.parent / "bomb"

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def refused(folder, words):
    with pytest.raises(parallel.CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert words in message and "is damaged" in message and "\n" not in message, message
    assert not (folder.parent / "bomb").exists(), "code of a checkpoint was run"


def test_what_was_written_is_read(written):
    assert load(written) == dict(step=1, tokens=5, placement=[[1, 2], [3]])
    assert sorted(path.name for path in written.iterdir()) == [".metadata", "__0_0.distcp", "files.json",
                                                               "progress.json"]


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"progress.json": 5}', '{"progress.json": ["a", "b"]}',
                                     '{"../other": [1, 2]}', '{"progress.json": [1, 2, 3]}', "[" * 100000])
def test_list_of_files(hostile, content):
    (hostile / "files.json").write_text(content)
    refused(hostile, "is damaged: files.json")


@pytest.mark.parametrize("name", ["files.json", "progress.json"])
def test_pickle_in_place_of_json(hostile, name):
    (hostile / name).write_bytes(pickle.dumps(Bomb(hostile)))
    if name != "files.json":
        sign(hostile)
    refused(hostile, f"is damaged: {name}")


@pytest.mark.parametrize("changes", [dict(step="1"), dict(step=None), dict(tokens=[1]), dict(placement=[["a"]]),
                                     dict(placement=[{}]), dict(placement=3), dict(step=True)], ids=str)
def test_progress_of_another_kind(hostile, changes):
    progress = json.loads((hostile / "progress.json").read_text())
    (hostile / "progress.json").write_text(json.dumps(progress | changes))
    sign(hostile)
    refused(hostile, f"progress.json has no {next(iter(changes))} of the right kind")


def metadata_of(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def with_metadata(folder, content):
    (folder / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    sign(folder)


def test_code_in_the_list_of_parts(hostile):
    """Alone, and inside of what DCP would write."""
    with_metadata(hostile, Bomb(hostile))
    refused(hostile, ".metadata names 'posix.mkdir', which no checkpoint needs")


@pytest.mark.parametrize("where", ["planner_data", "version", "storage_data"])
def test_code_inside_the_list_of_parts(hostile, where):
    metadata = metadata_of(hostile)
    setattr(metadata, where, Bomb(hostile))
    with_metadata(hostile, metadata)
    refused(hostile, ".metadata names 'posix.mkdir")


def test_list_of_parts_that_is_none(hostile):
    for content in (b"", b"no pickle", {}, [1], metadata_of(hostile).state_dict_metadata):
        with_metadata(hostile, content)
        refused(hostile, ".metadata cannot be read")


def test_list_of_parts_that_leads_elsewhere(hostile):
    metadata = metadata_of(hostile)
    for part in metadata.storage_data.values():
        part.relative_path = "/etc/passwd"
    with_metadata(hostile, metadata)
    refused(hostile, ".metadata names '/etc/passwd'")


def test_file_of_tensors_that_is_not_listed(hostile):
    """It would be read without its checksum."""
    files = json.loads((hostile / "files.json").read_text())
    del files["__0_0.distcp"]
    (hostile / "files.json").write_text(json.dumps(files))
    refused(hostile, ".metadata names '__0_0.distcp', which is not in files.json")


def test_a_tensor_that_is_said_to_be_an_object(hostile):
    """DCP would unpickle it. The type that says so is not among those that are read."""
    metadata = metadata_of(hostile)
    metadata.state_dict_metadata["random"] = BytesStorageMetadata()
    place, = [place for place in metadata.storage_data if place.fqn == "random"]
    metadata.storage_data[MetadataIndex("random")] = metadata.storage_data.pop(place)
    with_metadata(hostile, metadata)
    refused(hostile, "BytesStorageMetadata', which no checkpoint needs")


def test_code_in_place_of_tensors(hostile):
    """Every part of the list leads to an archive of torch.save with code in it."""
    archive = io.BytesIO()
    torch.save(Bomb(hostile), archive)
    (hostile / "__0_0.distcp").write_bytes(archive.getvalue())
    metadata = metadata_of(hostile)
    for part in metadata.storage_data.values():
        part.offset, part.length = 0, len(archive.getvalue())
    with_metadata(hostile, metadata)
    refused(hostile, "is damaged")


def test_random_changes(hostile):
    """Loaded or refused, and in one line, whatever byte of the list of parts or of the tensors is another."""
    rng, refusals = random.Random(0), 0
    for name in (".metadata", "__0_0.distcp"):
        whole = (hostile / name).read_bytes()
        for _ in range(60):
            changed = bytearray(whole)
            for _ in range(rng.randint(1, 8)):
                changed[rng.randrange(len(whole))] = rng.randrange(256)
            (hostile / name).write_bytes(changed)
            sign(hostile)
            try:
                load(hostile)
            except parallel.CheckpointError as error:
                assert "\n" not in str(error)
                refusals += 1
        (hostile / name).write_bytes(whole)
    assert refusals > 30
