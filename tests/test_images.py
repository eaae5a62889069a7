"""Where pictures come from, and what the crop makes of them."""

import io
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import (
    CLASSES,
    draw,
    encoded,
    jpeg,
    write_broken,
    write_class_folders,
    write_flat,
    write_label_files,
    write_tar,
    write_tars,
)
from PIL import Image, ImageOps, features

from elt_lightning.data.crops import UPRIGHT_CROP, Picture, Request, adm_centre_crop, crop_all, decode_picture
from elt_lightning.data.image_labels import read_labels
from elt_lightning.data.images import MOST_CLASSES, batches, fingerprint, list_pictures, open_source
from elt_lightning.errors import UserError

# ---- the crop ----


def box(t: np.ndarray) -> np.ndarray:
    return ((t > -0.5) & (t <= 0.5)).astype(np.float64)


def bicubic(t: np.ndarray) -> np.ndarray:
    """Keys 1981 with a = −1/2."""
    t = np.abs(t)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0))


def resampled(pixels: np.ndarray, length: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Resample the first axis: a dense matrix of kernel values, as wide as a step of the coarser grid."""
    step = len(pixels) / length
    centres = (np.arange(length) + 0.5) * step
    weights = kernel((np.arange(len(pixels)) + 0.5 - centres[:, None]) / max(step, 1))
    values = np.einsum("oi,ijc->ojc", weights / weights.sum(1, keepdims=True), pixels)
    return np.clip(np.floor(values + 0.5), 0, 255)


def naive_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    def to_shape(pixels: np.ndarray, height: int, width: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        across = resampled(pixels.swapaxes(0, 1), width, kernel).swapaxes(0, 1)
        return resampled(across, height, kernel)

    pixels = pixels.astype(np.float64)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = to_shape(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box)
    short = min(pixels.shape[:2])
    pixels = to_shape(pixels, round(pixels.shape[0] * size / short), round(pixels.shape[1] * size / short), bicubic)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


# Halving 4·n + 1 pixels, one lies on the border of two boxes, and the last bit of a float decides which has it.
SIDES = [side for side in range(5, 301) if all((side >> k) % 4 != 1 for k in range(5) if side >> k >= 32)]


@pytest.mark.parametrize("seed", range(12))
def test_the_crop_is_that_of_the_formula(seed: int) -> None:
    choose = random.Random(seed)
    width, height, size = choose.choice(SIDES), choose.choice(SIDES), choose.choice([16, 31, 64])
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    crop = adm_centre_crop(picture, size)
    assert (crop.shape, crop.dtype) == ((size, size, 3), np.uint8)
    assert (
        np.abs(crop - naive_crop(np.array(picture), size)).max() <= 2
    )  # it rounds to bytes after every pass, with its own bits


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    picture = draw(1, (64, 64))
    assert np.array_equal(adm_centre_crop(picture, 64), np.array(picture))


def test_a_picture_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="elongated"):
        adm_centre_crop(Image.new("RGB", (60000, 1)), 256)


# ---- decoding ----


def test_every_mode_becomes_rgb() -> None:
    colours = draw(2, (40, 30))
    reference = np.array(colours)
    for mode in ("RGBA", "P", "RGB"):
        found = np.array(decode_picture(encoded(colours.convert(mode), "PNG")))
        assert np.array_equal(found, np.array(colours.convert(mode).convert("RGB")))
    for mode in ("L", "LA", "1"):
        found = np.array(decode_picture(encoded(colours.convert(mode), "PNG")))
        assert np.array_equal(found, np.array(colours.convert(mode).convert("L"))[..., None].repeat(3, 2))
    inks = np.array(decode_picture(jpeg(colours.convert("CMYK")))).astype(int)
    assert np.abs(inks - reference).mean() < 8
    for kind in ("WEBP", "BMP", "GIF"):
        assert decode_picture(encoded(colours, kind)).mode == "RGB"


def test_of_sixteen_bits_the_upper_eight_are_kept() -> None:
    levels = np.linspace(0, 65535, 40 * 30).round().astype(np.uint16).reshape(30, 40)
    found = np.array(decode_picture(encoded(Image.fromarray(levels), "PNG")))
    assert np.array_equal(found, (levels // 256)[..., None].repeat(3, 2))


@pytest.mark.parametrize("alpha", [0, 96, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lets_white_through(mode: str, alpha: int) -> None:
    colours = draw(3, (40, 30)).convert({"RGBA": "RGB", "LA": "L", "P": "P"}[mode])
    if mode == "P":
        content = encoded(colours, "PNG", transparency=bytes([alpha] * 256))
    else:
        colours.putalpha(alpha)
        content = encoded(colours, "PNG")
    expected = 255 - (255 - np.array(colours.convert("RGB")).astype(float)) * alpha / 255
    assert np.abs(np.array(decode_picture(content)) - expected).max() <= (0 if alpha in (0, 255) else 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tag", range(1, 10))
def test_the_orientation_tag_turns_a_picture_where_that_is_asked_for(kind: str, tag: int) -> None:
    turned = Image.Exif()
    turned[0x0112] = tag  # 9 is none
    content = encoded(draw(3, (40, 30)), kind, exif=turned)
    stored = Image.open(io.BytesIO(content))
    assert np.array_equal(np.array(decode_picture(content)), np.array(stored))
    upright = np.array(ImageOps.exif_transpose(stored))
    assert np.array_equal(np.array(decode_picture(content, upright=True)), upright)
    (crops,) = crop_all([Request(0, [])], 16, 0, UPRIGHT_CROP)
    assert crops.num_tried == 0
    assert np.array_equal(upright, np.array(stored)) == (tag in (1, 9))


def test_numbers_of_no_known_range_are_no_picture() -> None:
    for levels in (np.linspace(0, 1, 12, dtype=np.float32), np.linspace(0, 2**20, 12, dtype=np.int32)):
        content = encoded(Image.fromarray(levels.reshape(3, 4)), "TIFF")
        with pytest.raises(ValueError, match=r"numbers from 0 to 1.*no known range"):
            decode_picture(content)


def test_what_cannot_be_read_is_named_with_its_reason_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_broken(tmp_path)
    contents = {
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n",
        "bomb.png": encoded(Image.new("1", (300, 300)), "PNG"),
        "good.png": encoded(draw(4, (40, 30)), "PNG"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    names = [*sorted(os.listdir(tmp_path)), "missing.jpg"]
    request = Request(3, [Picture(name, str(tmp_path / name)) for name in names])
    (crops,) = crop_all([request], 24, num_workers=0)
    assert [picture.source for picture in crops.pictures] == ["good.png"]
    assert np.array_equal(crops.pixels[0].permute(1, 2, 0), adm_centre_crop(draw(4, (40, 30)), 24))
    reasons = dict(crops.unreadable)
    assert sorted(reasons) == sorted(set(names) - {"good.png"})
    assert "DecompressionBomb" in reasons["bomb.png"]
    assert "truncated" in reasons["broken_cut.JPEG"]
    assert reasons["postscript.jpg"] == "not a picture that Pillow reads"
    assert (crops.part, crops.num_tried) == (3, len(names))


# ---- folders ----


def test_a_folder_lists_its_pictures_in_order_without_hidden_ones(tmp_path: Path) -> None:
    names = write_class_folders(tmp_path / "real")
    (tmp_path / "real" / CLASSES[0] / "notes.txt").write_text("no picture")
    nested = tmp_path / "real" / CLASSES[1] / "more" / "deeper"
    nested.mkdir(parents=True)
    (nested / "x.PNG").write_bytes(encoded(draw(5, (9, 9)), "PNG"))
    root = tmp_path / "linked"
    root.mkdir()
    for name in CLASSES:
        (root / name).symlink_to(tmp_path / "real" / name)
    listing, others = list_pictures(str(root))
    assert others == [f"{CLASSES[0]}/notes.txt"]
    assert [name for name, _ in listing] == sorted([*names, f"{CLASSES[1]}/more/deeper/x.PNG"])
    assert all((root / name).stat().st_size == size for name, size in listing)


def test_whatever_pillow_reads_is_taken_and_the_rest_is_counted_by_suffix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {"a.gif": "GIF", "b.tif": "TIFF", "c.TIFF": "TIFF", "d.ppm": "PPM", "e.jfif": "JPEG", "f.tga": "TGA"}
    kinds |= {"g": "JPEG", "h": "PNG", "i.jp2": "JPEG2000"} | ({"j.avif": "AVIF"} if features.check("avif") else {})
    (tmp_path / "cats").mkdir()
    for name, kind in kinds.items():
        (tmp_path / "cats" / name).write_bytes(encoded(draw(1, (20, 20)), kind))
    for name in ("README", "x.txt", "y.TXT", "z.heic", ".hidden"):
        (tmp_path / "cats" / name).write_text("no picture")
    os.mkfifo(tmp_path / "cats" / "waits")
    source = open_source([str(tmp_path)])
    assert sorted(picture.source for picture in source.part(0)) == [f"cats/{name}" for name in sorted(kinds)]
    assert caplog.messages == [f"left out of {tmp_path}, as no pictures: 2 without a suffix, 2 .txt, 1 .heic"]
    (crops,) = crop_all([Request(0, source.part(0))], 20, num_workers=0)
    assert crops.unreadable == []
    assert [len(batch) for batch in batches(str(tmp_path), 20, 64, workers=0)] == [len(kinds)]
    assert caplog.messages[1:] == caplog.messages[:1]
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "1.heic").touch()
    with pytest.raises(UserError, match=r"dogs has no pictures, only 1 \.heic: remove it"):
        open_source([str(tmp_path)])
    with pytest.raises(UserError, match=r"dogs has no pictures, only 1 \.heic, and it is no folder of \.tar"):
        list(batches(str(tmp_path / "dogs"), 20, 64, workers=0))


def test_what_is_no_file_is_named_and_links_that_lead_round_are_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    os.mkfifo(tmp_path / CLASSES[0] / "waits.jpg")
    (tmp_path / CLASSES[0] / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / CLASSES[0] / "round.jpg").symlink_to("round.jpg")
    (crops,) = crop_all([Request(0, open_source([str(tmp_path)]).part(0))], 16, num_workers=0)
    assert len(crops.pictures) == 15
    reasons = dict(crops.unreadable)
    assert "a FIFO" in reasons[f"{CLASSES[0]}/waits.jpg"]
    assert "a device" in reasons[f"{CLASSES[0]}/endless.jpg"]
    assert "symbolic links" in reasons[f"{CLASSES[0]}/round.jpg"]
    (tmp_path / CLASSES[1] / "up").symlink_to("..")
    with pytest.raises(UserError, match=rf"^{tmp_path}/{CLASSES[1]}/up is a link to a folder that it lies in"):
        open_source([str(tmp_path)])


def test_parts_of_a_folder_hold_every_picture_once_with_its_class(tmp_path: Path) -> None:
    names = write_class_folders(tmp_path)
    source = open_source([str(tmp_path)], samples_per_shard=4)
    assert source.classes == CLASSES
    assert source.num_parts == 4
    parts = [source.part(number) for number in range(4)]
    assert [len(part) for part in parts] == [source.count(number) for number in range(4)] == [4, 4, 4, 3]
    pictures = [picture for part in parts for picture in part]
    assert sorted(picture.source for picture in pictures) == names
    assert [picture.number for picture in pictures] == list(range(15))
    for picture in pictures:
        assert picture.read() == (tmp_path / picture.source).read_bytes()
        assert CLASSES[picture.label] == picture.source.partition("/")[0]
    assert len({picture.label for picture in parts[0]}) > 1


def test_the_order_of_a_folder_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    orders = [
        [picture.source for part in range(source.num_parts) for picture in source.part(part)]
        for source in (
            open_source([str(tmp_path)], seed=seed, samples_per_shard=size) for seed, size in ((0, 4), (0, 7), (1, 4))
        )
    ]
    assert orders[0] == orders[1] != orders[2]


def test_classes_are_sorted_and_numbers_as_numbers(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "numbers", classes=("10", "9", "100"))
    assert open_source([str(tmp_path / "numbers")]).classes == ("9", "10", "100")
    write_class_folders(tmp_path / "names", classes=("b", "10", "a"))
    assert open_source([str(tmp_path / "names")]).classes == ("10", "a", "b")


def test_classes_of_another_set_decide_the_numbers(tmp_path: Path) -> None:
    write_class_folders(tmp_path, classes=CLASSES[1:])
    classes = (CLASSES[2], "n09999999", CLASSES[1])
    source = open_source([str(tmp_path)], classes=classes)
    assert source.classes == classes
    assert {picture.source[:9]: picture.label for picture in source.part(0)} == {CLASSES[2]: 0, CLASSES[1]: 2}
    with pytest.raises(UserError, match=CLASSES[2]):
        open_source([str(tmp_path)], classes=CLASSES[:2])


def test_pictures_without_a_class_and_classes_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source([str(tmp_path / "missing")])
    with pytest.raises(UserError, match="no pictures"):
        open_source([str(tmp_path)])
    write_class_folders(tmp_path)
    (tmp_path / "n00000001").mkdir()
    with pytest.raises(UserError, match=r"n00000001 has no pictures.*classes_from"):
        open_source([str(tmp_path)])
    assert open_source([str(tmp_path)], classes=(*CLASSES, "n00000001")).num_parts == 1
    (tmp_path / "stray.jpg").touch()
    with pytest.raises(UserError, match=r"stray\.jpg.*--labels"):
        open_source([str(tmp_path)])


def test_a_fingerprint_is_of_names_and_sizes(tmp_path: Path) -> None:
    root = tmp_path / "here"
    write_class_folders(root)
    first = fingerprint(str(root))
    root = root.rename(tmp_path / "there")
    assert fingerprint(f"{root}/") == first == open_source([str(root)]).description["pictures"]
    path = root / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert fingerprint(str(root)) != first
    path.write_bytes(bytes(len(content)))
    assert fingerprint(str(root)) == first
    path.rename(path.with_name("another.JPEG"))
    assert fingerprint(str(root)) != first


# ---- labels ----


@pytest.mark.parametrize("kind", ["commas", "tabs", "spaces", "kaggle", "synsets"])
def test_a_flat_folder_takes_its_classes_from_a_file(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "val"
    classes = write_flat(root)
    labels = write_label_files(tmp_path, root, classes)[kind]
    source = open_source([str(root)], labels=str(labels))
    assert source.classes == tuple(sorted(set(classes)))
    found = {picture.source: source.classes[picture.label] for picture in source.part(0)}
    assert [found[name] for name in sorted(found)] == classes


def test_pictures_in_folders_are_found_by_path_or_name(tmp_path: Path) -> None:
    names = ["a/x.jpg", "b/x.jpg", "b/y.jpg"]
    path = tmp_path / "labels.csv"
    path.write_text("a/x.jpg,cat\nb/x,dog\ny.jpg,cat\n")
    assert read_labels(str(path), names) == ["cat", "dog", "cat"]
    path.write_text("x.jpg cat\ny dog\n")
    with pytest.raises(UserError, match=r"a/x\.jpg or b/x\.jpg"):
        read_labels(str(path), names)


@pytest.mark.parametrize(
    "content",
    [
        '"1.jpg","tabby, brown"\n"2, new.jpg","dog"\n',
        '1.jpg,"tabby, brown"\n2, new.jpg,dog\n',
        '"1.jpg", "tabby, brown"\r\n"2, new.jpg", dog\r\n',
        "1.jpg\ttabby, brown\n2, new.jpg\tdog\n",
        '"1.jpg" "tabby, brown"\n"2, new.jpg" dog\n',
        '"tabby, brown"\n"dog"\n',
        '"ImageId","PredictionString"\n"1","tabby, brown"\n"2, new","dog 1 2 3 4 "\n',
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_quotes_and_byte_order_marks_are_no_part_of_names(tmp_path: Path, content: str, mark: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes((mark + content).encode())
    kaggle = "ImageId" in content  # where a class ends at the first space
    assert read_labels(str(path), ["1.jpg", "2, new.jpg"]) == ["tabby," if kaggle else "tabby, brown", "dog"]


def test_lines_of_pictures_that_are_not_there_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("picture,class\n1.jpg,cat\n2.jpg,dog\n3.jpg,dog\n")
    assert read_labels(str(path), ["1.jpg"]) == ["cat"]
    assert caplog.messages == [f"{path}: 2 lines are of pictures that are not there, such as 2.jpg"]


@pytest.mark.parametrize(
    ("content", "telling"),
    [
        ('1.jpg,"cat\n2.jpg,dog\n', "double quote"),
        ("1.jpg,cat\n2.jpg,\n", "no class"),
        ("1.jpg,cat\n1.jpg,dog\n2.jpg,cat\n", "two classes"),
        ("1.jpg,cat\n", r"no class for the picture 2\.jpg"),
        ("cat\n", "1 lines, but there are 2 pictures"),
        ("cat\n2.jpg dog\n", "one and of two columns"),
        ("", "0 lines"),
    ],
)
def test_a_wrong_file_of_labels_is_refused(tmp_path: Path, content: str, telling: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=telling):
        read_labels(str(path), ["1.jpg", "2.jpg"])


def test_a_missing_or_binary_file_of_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("missing.txt", "labels.txt"):
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            read_labels(str(tmp_path / name), ["1.jpg"])


# ---- tars ----


@pytest.mark.parametrize("as_folder", [True, False])
def test_tars_give_their_pictures_and_labels(tmp_path: Path, as_folder: bool) -> None:
    written = write_tars(tmp_path, counts=(4, 0, 3))
    roots = [str(tmp_path)] if as_folder else [str(tmp_path / "train-{000..001}.tar"), str(tmp_path / "train-002.tar")]
    source = open_source(roots)
    assert (source.classes, source.num_parts, source.count(0)) == (None, 3, None)
    pictures = [picture for part in range(3) for picture in source.part(part)]
    assert [(picture.read(), picture.label) for picture in pictures] == written
    assert pictures[0].source == "train-000.tar/train/000000.jpg"
    numbers = [picture.number for picture in pictures]
    assert numbers == sorted(set(numbers))
    assert source.part(2) == pictures[4:]


def test_numbers_are_unique_even_for_the_smallest_pictures(tmp_path: Path) -> None:
    for number in range(3):
        members = [(f"{place}.{kind}", b"%d" % number) for place in range(20) for kind in ("cls", "jpg")]
        write_tar(tmp_path / f"{number}.tar", members)
    source = open_source([str(tmp_path)])
    numbers = [picture.number for part in range(3) for picture in source.part(part)]
    assert len(set(numbers)) == 60
    assert max(numbers) < 60 * 2 * 3


def one_tar(tmp_path: Path, *members: tuple[str, bytes]) -> str:
    write_tar(tmp_path / "x.tar", members)
    return str(tmp_path / "x.tar")


def test_labels_of_tars_may_be_names_that_another_set_knows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [("a.b.jpg", b""), ("a.png", b""), ("a.json", b'{"label": "dog"}'), ("b.JPG", b""), ("b.cls", b"2")]
    root = one_tar(tmp_path, *members, ("b.json", b'{"label": "dog"}'), ("._b.jpg", b""), ("c.txt", b""))
    pictures = open_source([root], classes=("cat", "dog", "cow")).part(0)
    assert [(picture.source, picture.label) for picture in pictures] == [("x.tar/a.png", 1), ("x.tar/b.JPG", 2)]
    assert caplog.messages == ["left out of " + root + ", as no pictures: 1 .jpg, 1 .txt"]
    with pytest.raises(UserError, match=r"'dog'.*classes_from"):
        open_source([root]).part(0)


def test_a_copy_of_a_tar_is_refused_and_files_beside_tars_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tars(tmp_path, counts=(4, 4, 0, 0))
    (tmp_path / "train-004.tar.gz").touch()
    assert open_source([str(tmp_path)]).num_parts == 4
    assert caplog.messages == [f"left out of {tmp_path}, as no tars: 1 .gz"]
    (tmp_path / "train-001.tar").write_bytes((tmp_path / "train-000.tar").read_bytes())
    with pytest.raises(UserError, match=r"train-001\.tar is a copy of .*train-000\.tar"):
        open_source([str(tmp_path)])
    (tmp_path / "train-001.tar").unlink()
    os.mkfifo(tmp_path / "train-001.tar")
    with pytest.raises(UserError, match=r"train-001\.tar cannot be read: it is a FIFO"):
        open_source([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "content", "telling"),
    [
        ("a.txt", b"3", "has no label"),
        ("a.cls", b"three", r"a\.cls cannot be read"),
        ("a.json", b"{", r"a\.json cannot be read"),
        ("a.json", b'{"label": [3]}', "neither a number nor a name"),
        ("a.json", b'{"label": "fish"}', "'fish', which is not a class"),
        ("a.cls", b"2", "2, which is not a class"),
        ("a.cls", b"-1", "-1, which is not a class"),
    ],
)
def test_a_wrong_label_of_a_tar_is_named(tmp_path: Path, name: str, content: bytes, telling: str) -> None:
    root = one_tar(tmp_path, ("a.jpg", b""), (name, content))
    with pytest.raises(UserError, match=telling):
        open_source([root], classes=("cat", "dog")).part(0)


def test_a_class_number_must_be_credible(tmp_path: Path) -> None:
    root = one_tar(tmp_path, ("a.jpg", b""), ("a.cls", str(MOST_CLASSES).encode()))
    with pytest.raises(UserError, match="class number"):
        open_source([root]).part(0)


@pytest.mark.parametrize(
    "damage", ["cut in a picture", "cut in a header", "no end", "header", "hole", "text", "compressed"]
)
def test_a_damaged_tar_is_noticed(tmp_path: Path, damage: str) -> None:
    write_tars(tmp_path, counts=(6,))
    path = tmp_path / "train-000.tar"
    picture = open_source([str(path)]).part(0)[3]
    content = bytearray(path.read_bytes())
    if damage == "cut in a picture":
        content = content[: picture.offset + 100]
    elif damage == "cut in a header":
        content = content[: picture.offset - 100]
    elif damage == "no end":
        content = content[: picture.offset - 512]
    elif damage == "header":
        content[picture.offset - 400 : picture.offset - 300] = b"\x7f" * 100
    elif damage == "hole":
        content[picture.offset - 512 : picture.offset + 3 * 512] = bytes(4 * 512)
    elif damage == "text":
        content = bytearray(b"not a tar" * 1000)
    else:
        content = bytearray(b"\x1f\x8b" + bytes(content))
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-000\.tar is compressed, damaged or cut short"):
        open_source([str(path)]).part(0)


def test_what_is_neither_a_folder_nor_tars_is_refused(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    tar = str(tmp_path / "tars" / "train-000.tar")
    for roots, telling in (
        ([tar, str(tmp_path)], "is no tar file"),
        ([tar, tar], r"two tars are called train-000\.tar"),
        ([str(tmp_path / "train-{0..2}.tar")], r"train-0\.tar does not exist"),
        ([str(tmp_path / "train-{0..2.tar")], "no list of tars"),
    ):
        with pytest.raises(UserError, match=telling):
            open_source(roots)
    with pytest.raises(UserError, match="--labels is for folders"):
        open_source([tar], labels="labels.txt")


# ---- all pictures, without labels ----


def test_batches_are_all_pictures_in_order_whoever_decodes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = write_class_folders(tmp_path)
    write_flat(tmp_path / "flat")
    broken = write_broken(tmp_path / CLASSES[0])
    with caplog.at_level(logging.WARNING):
        by_two = list(batches(str(tmp_path), 16, 4, workers=2))
    assert all(sum(name in message for message in caplog.messages) == 1 for name in broken)
    assert "3 of 27" in caplog.messages[-1]
    alone = torch.cat(list(batches(str(tmp_path), 16, 7, workers=0)))
    assert torch.equal(torch.cat(by_two), alone)
    assert max(len(batch) for batch in by_two) <= 4
    flat = [f"flat/{path.name}" for path in (tmp_path / "flat").iterdir()]
    for name, pixels in zip(sorted([*names, *flat]), alone, strict=True):
        picture = Image.open(tmp_path / name).convert("RGB")
        assert np.array_equal(pixels.permute(1, 2, 0), adm_centre_crop(picture, 16))


def test_batches_of_tars_need_no_labels(tmp_path: Path) -> None:
    written = write_tars(tmp_path)
    write_tar(tmp_path / "train-002.tar", [("x.png", encoded(draw(6, (30, 30)), "PNG"))])
    found = torch.cat(list(batches(str(tmp_path), 16, 3, workers=0)))
    expected = [decode_picture(content) for content, _ in written] + [draw(6, (30, 30))]
    assert len(found) == 4 + 3 + 1
    for pixels, picture in zip(found, expected, strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0), adm_centre_crop(picture, 16))


def test_batches_of_nothing_readable_are_refused(tmp_path: Path) -> None:
    write_broken(tmp_path)
    with pytest.raises(UserError, match="none of the 3 pictures"):
        list(batches(str(tmp_path), 16, 4, workers=0))
