"""Cartoon faces: reproducible, varied, and written as a complete set or not at all."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import face_set, faces
from pipeline.config import ConfigError
from pipeline.drawing import distance
from pipeline.face_set import write_faces
from pipeline.faces import Face, draw_face, sample_face


@pytest.fixture(scope="module")
def traits() -> list[Face]:
    return [sample_face(0, number) for number in range(500)]


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(np.int16)


def test_a_face_is_a_pure_function_of_seed_and_number() -> None:
    assert draw_face(3, 7).tobytes() == draw_face(3, 7).tobytes()


def test_another_number_or_seed_gives_another_face() -> None:
    face = pixels(draw_face(3, 7))
    for other in (draw_face(3, 8), draw_face(4, 7)):
        assert np.abs(face - pixels(other)).mean() > 10


def test_traits_never_depend_on_the_platform() -> None:
    face = sample_face(0, 0)
    assert (face.hair_style, face.hair_name, face.mouth, face.glasses) == ("straight", "espresso", "smile", "none")
    assert face.skin == (255, 225, 200)


@pytest.mark.parametrize("size", [(178, 218), (64, 64), (240, 190), (33, 90)])
def test_a_face_has_the_size_asked_for_and_is_rgb(size: tuple[int, int]) -> None:
    face = draw_face(0, 1, size)
    assert face.size == size
    assert face.mode == "RGB"


def test_the_head_lies_in_the_middle_of_every_shape_of_picture() -> None:
    plain = [number for number in range(16) if sample_face(0, number).glasses == "none"]
    for number in plain[:8]:
        skin = sample_face(0, number).skin
        for size in ((178, 218), (178, 178), (260, 178)):
            cheek = draw_face(0, number, size).getpixel((size[0] // 2, size[1] // 2 + 8))
            assert distance(cheek, skin) < 80


def test_five_hundred_faces_show_every_style_and_colour(traits: list[Face]) -> None:
    for name, options, at_least in (
        ("hair_style", faces.HAIR_STYLES, 30),
        ("hair_name", faces.HAIRS, 5),
        ("mouth", faces.MOUTHS, 100),
        ("collar", faces.COLLARS, 100),
        ("clothes", faces.CLOTHES, 10),
        ("iris", faces.IRISES, 20),
        ("side", (-1, 1), 150),
    ):
        counts = collections.Counter(getattr(face, name) for face in traits)
        assert set(counts) == set(options), name
        assert min(counts.values()) >= at_least, name


def test_about_a_quarter_wear_glasses_and_a_seventh_a_beard(traits: list[Face]) -> None:
    assert 0.18 < np.mean([face.glasses != "none" for face in traits]) < 0.32
    assert 0.09 < np.mean([face.beard != "none" for face in traits]) < 0.23
    assert {face.beard for face in traits} == {"none", "beard", "moustache"}


def test_poses_and_skins_fill_their_range(traits: list[Face]) -> None:
    tilt = np.degrees([face.tilt for face in traits])
    assert -4 <= tilt.min() < -3.5
    assert 3.5 < tilt.max() <= 4
    turn = np.array([face.turn for face in traits])
    assert turn.min() < -0.9
    assert turn.max() > 0.9
    assert {face.light > 0 for face in traits} == {True, False}
    brightness, _ = np.histogram([sum(face.skin) / 3 for face in traits], bins=6, range=(80, 230))
    assert brightness.min() >= 30


def test_hair_stands_out_from_the_skin_and_both_from_the_background(traits: list[Face]) -> None:
    for face in traits:
        assert distance(face.hair, face.skin) > 65
        assert distance(face.background, face.skin) > 40
        assert distance(face.background, face.hair) > 40


def test_no_two_faces_of_a_set_share_their_traits(traits: list[Face]) -> None:
    assert len(set(traits)) == len(traits)


def test_a_written_set_holds_jpegs_of_mixed_sizes(tmp_path: Path) -> None:
    write_faces(tmp_path / "set", 80, workers=1)
    files = sorted((tmp_path / "set").glob("*.jpg"))
    assert [file.name for file in files] == [f"{number:06d}.jpg" for number in range(80)]
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    for file in files:
        with Image.open(file) as picture:
            picture.load()
            assert picture.format == "JPEG"
            assert picture.mode in ("RGB", "L")
            sizes[picture.size] += 1
    assert sizes[178, 218] > 40
    assert len(sizes) > 5
    assert any(width > height for width, height in sizes)


def test_a_file_is_the_drawn_face(tmp_path: Path) -> None:
    write_faces(tmp_path / "set", 4, seed=5, quality=(95, 95), workers=1)
    with Image.open(tmp_path / "set" / "000003.jpg") as picture:
        assert np.abs(pixels(picture) - pixels(draw_face(5, 3, picture.size))).mean() < 4


def test_worker_processes_write_the_same_bytes(tmp_path: Path) -> None:
    script = tmp_path / "write.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(faces.__file__).parents[1])!r})\n"
        "from pipeline.face_set import write_faces\n"
        "if __name__ == '__main__':\n"
        "    write_faces('two', 40, workers=2)\n"
        "    assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, timeout=60)
    write_faces(tmp_path / "one", 40, workers=1)
    for file in sorted((tmp_path / "one").iterdir()):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


def test_a_complete_set_of_the_same_recipe_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_faces(tmp_path / "set", 3, workers=1)
    (tmp_path / "set" / "index.json").write_text("{}")  # files beside the pictures do no harm
    monkeypatch.setattr(face_set, "_write_face", lambda *_: pytest.fail("a face was drawn"))
    write_faces(tmp_path / "set", 3, workers=1)


@pytest.mark.parametrize("other", [{"count": 4}, {"seed": 1}, {"quality": (90, 95)}])
def test_a_set_of_another_recipe_is_refused(tmp_path: Path, other: dict[str, object]) -> None:
    recipe: dict[str, object] = {"count": 3, "seed": 0, "workers": 1}
    write_faces(tmp_path / "set", **recipe)
    with pytest.raises(ConfigError, match=r"set: holds another set of faces") as error:
        write_faces(tmp_path / "set", **(recipe | other))
    assert "\n" not in str(error.value)
    assert "(3 faces of seed 0, quality [80, 95]" in str(error.value)


def test_a_set_of_an_older_drawing_is_refused(tmp_path: Path) -> None:
    write_faces(tmp_path / "set", 2, workers=1)
    recipe = json.loads((tmp_path / "set" / "faces.json").read_text())
    (tmp_path / "set" / "faces.json").write_text(json.dumps(recipe | {"version": 0}))
    with pytest.raises(ConfigError, match="another set"):
        write_faces(tmp_path / "set", 2, workers=1)


def test_a_set_that_lost_a_face_is_refused(tmp_path: Path) -> None:
    write_faces(tmp_path / "set", 2, workers=1)
    (tmp_path / "set" / "000001.jpg").unlink()
    with pytest.raises(ConfigError, match=r"1 faces are missing, the first is 000001\.jpg"):
        write_faces(tmp_path / "set", 2, workers=1)


def test_other_files_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="holds other files"):
        write_faces(tmp_path, 2, workers=1)
    with pytest.raises(ConfigError, match="this is a file"):
        write_faces(tmp_path / "holiday.jpg", 2, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_faces(tmp_path / "set", 2, workers=1)
    assert (tmp_path / "set" / "000001.jpg").is_file()


def test_an_interrupted_set_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = face_set._write_face

    def stop_at_two(folder: Path, seed: int, quality: tuple[int, int], number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write(folder, seed, quality, number)

    monkeypatch.setattr(face_set, "_write_face", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        write_faces(tmp_path / "set", 4, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_another_process_finished_first_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds, answers = face_set._holds, iter([False])
    write_faces(tmp_path / "set", 2, workers=1)
    monkeypatch.setattr(face_set, "_holds", lambda *arguments: next(answers, None) is not False and holds(*arguments))
    write_faces(tmp_path / "set", 2, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("bad", [{"count": 0}, {"quality": (0, 50)}, {"quality": (90, 80)}, {"quality": (90, 101)}])
def test_a_bad_argument_is_refused_before_anything_is_written(tmp_path: Path, bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        write_faces(tmp_path / "set", **({"count": 2, "workers": 1} | bad))
    assert list(tmp_path.iterdir()) == []
