import numpy as np
import pytest
from PIL import Image

from accel.data import CentreView, RandomWindows, image_folder

VIEW = CentreView(image_size=8, shorter_side=8)
RED = (200, 40, 10)


def save(path, colour=RED, size=(12, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def read(folder, **arguments):
    source = image_folder(folder, "unchanged", **{"viewer": VIEW, **arguments})
    return source, np.concatenate(list(source.batches(3)))


def noise(folder, count, size=12):
    generator = np.random.default_rng(5)
    for index in range(count):
        folder.mkdir(exist_ok=True)
        values = generator.integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")


def test_pictures_are_found_in_all_folders_in_the_order_of_their_paths(tmp_path):
    names = ["b/2.JPEG", "a/z.png", "a/c/1.Png", "a.bmp", "b/10.gif"]
    levels = {name: 40 * index for index, name in enumerate(names)}
    for name, level in levels.items():
        save(tmp_path / name, (level, level, level))
    save(tmp_path / ".hidden" / "x.png")
    save(tmp_path / "a" / "._z.png")
    (tmp_path / "readme.txt").write_text("no picture")
    source, images = read(tmp_path)
    ordered = ["a/c/1.Png", "a/z.png", "a.bmp", "b/10.gif", "b/2.JPEG"]
    assert [source.pictures[i].name for i in range(5)] == [str(tmp_path / name) for name in ordered]
    np.testing.assert_allclose(images[:, 0, 0, 0], [levels[name] for name in ordered], atol=2)
    assert source.image_shape == (8, 8, 3)


def test_relative_folders_are_read(tmp_path, monkeypatch):
    save(tmp_path / "photos" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert len(read("photos")[1]) == 1


def test_links_to_folders_are_followed(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(read(tmp_path / "photos")[1]) == 1


def grey_and_alpha():
    picture = Image.new("RGBA", (12, 10), (*RED, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 6, 10))
    return picture


def palette_with_transparency():
    picture = Image.new("P", (12, 10), 1)
    picture.putpalette([0, 0, 0, *RED])
    picture.paste(0, (0, 0, 6, 10))
    picture.info["transparency"] = bytes([0, 255])
    return picture


@pytest.mark.parametrize(
    ("name", "picture", "left", "right"),
    [
        ("grey.png", Image.new("L", (12, 10), 90), (90,) * 3, (90,) * 3),
        ("grey.jpg", Image.new("L", (12, 10), 90), (90,) * 3, (90,) * 3),
        ("bits.png", Image.new("1", (12, 10), 1), (255,) * 3, (255,) * 3),
        ("deep.png", Image.new("I;16", (12, 10), 257 * 90), (90,) * 3, (90,) * 3),
        ("inks.jpg", Image.new("RGB", (12, 10), RED).convert("CMYK"), RED, RED),
        ("alpha.png", grey_and_alpha(), (255, 255, 255), RED),
        ("alpha.webp", grey_and_alpha(), (255, 255, 255), RED),
        ("grey_alpha.png", Image.new("LA", (12, 10), (90, 255)), (90,) * 3, (90,) * 3),
        ("palette.png", palette_with_transparency(), (255, 255, 255), RED),
        ("palette.gif", Image.new("RGB", (12, 10), RED).quantize(), RED, RED),
    ],
)
def test_pictures_of_every_mode_become_rgb(tmp_path, name, picture, left, right):
    options = {"lossless": True} if name.endswith("webp") else {}
    picture.save(tmp_path / name, **options)
    _, images = read(tmp_path)
    np.testing.assert_allclose(images[0, 4, 1], left, atol=4)
    np.testing.assert_allclose(images[0, 4, 6], right, atol=4)


def test_pictures_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (12, 12), (0, 0, 0))
    picture.paste(RED, (0, 0, 12, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # The top of the picture is stored at its left: turn it clockwise.
    picture.save(tmp_path / "turned.png", exif=exif)
    _, images = read(tmp_path)
    np.testing.assert_array_equal(images[0, 4, 7], RED)
    np.testing.assert_array_equal(images[0, 0, 0], (0, 0, 0))


def test_every_window_is_the_same_whatever_the_batches(tmp_path):
    noise(tmp_path, 3)
    windows = RandomWindows(4, seed=3, image_size=8, shorter_side=24)
    source = image_folder(tmp_path, "caffe", windows)
    assert len(source) == 12
    whole = np.concatenate(list(source.batches(12)))
    for size in (1, 5):
        np.testing.assert_array_equal(np.concatenate(list(source.batches(size))), whole)
    loaded = source.loaded()
    assert loaded.pixels.dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate(list(loaded.batches(7))), whole)
    assert len({image.tobytes() for image in whole}) == 12
    assert source.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_folders_as_classes(tmp_path):
    for name in ("n02", "n10", "n01"):
        for index in range(2):
            save(tmp_path / name / f"{index}.png")
    save(tmp_path / "n02" / "more" / "0.png")
    (tmp_path / "n00").mkdir()
    source, _ = read(tmp_path, labels="folders")
    assert source.class_count == 4
    labels = np.concatenate([given for _, given in source.labelled_batches(3)])
    assert labels.tolist() == [1, 1, 2, 2, 2, 3, 3]
    np.testing.assert_array_equal(source.loaded().labels, labels)
    save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png: lies in no class folder"):
        read(tmp_path, labels="folders")


def test_labels_from_a_file(tmp_path):
    folder, file = tmp_path / "photos", tmp_path / "labels.txt"
    for name in ("a b.png", "c/1.png"):
        save(folder / name)
    file.write_text("c/1.png 7\n\na b.png 65\n")
    source, _ = read(folder, labels=file)
    assert next(source.labelled_batches(2))[1].tolist() == [65, 7]
    assert source.class_count is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png 1", r"labels\.txt: no label for 1 images, the first b\.png"),
        ("a.png 1\nb.png 2\nc.png 3", r"1 images are not in .*, the first c\.png"),
        ("a.png 1\na.png 1\nb.png 2", "line 2: a.png is listed twice"),
        ("a.png 1\nb.png", "line 2: expected 'path label', found 'b.png'"),
        ("a.png -1", "line 1: expected 'path label'"),
        ("7", "line 1: expected 'path label'"),
    ],
)
def test_label_files_that_do_not_fit_are_refused(tmp_path, text, message):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, labels=tmp_path / "labels.txt")


def test_a_file_of_labels_has_to_be_there(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="none: no such file of labels"):
        read(tmp_path, labels=tmp_path / "none")


def test_some_pictures_are_drawn_by_the_seed_with_their_labels(tmp_path):
    for index in range(9):
        save(tmp_path / f"class{index}" / "0.png", (index * 20,) * 3)
    draws = [read(tmp_path, labels="folders", pictures=4, seed=seed) for seed in (0, 0, 1)]
    names = [[source.pictures[i].name for i in range(4)] for source, _ in draws]
    assert names[0] == names[1] == sorted(names[0])
    assert names[0] != names[2]
    source, images = draws[0]
    assert source.class_count == 9
    labels = np.concatenate([given for _, given in source.labelled_batches(4)])
    np.testing.assert_array_equal(images[:, 0, 0, 0], 20 * labels)
    with pytest.raises(ValueError, match="10 images wanted, 9 found"):
        read(tmp_path, pictures=10)


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: not a folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "note.txt").write_text("no picture")
    with pytest.raises(ValueError, match="no images in it"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no picture at all"])
def test_a_file_that_is_no_picture_is_refused_at_once(tmp_path, content):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.png: cannot be read as an image"):
        image_folder(tmp_path, "caffe")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
def test_a_file_that_breaks_off_is_named(tmp_path, suffix):
    noise(tmp_path, 2, size=64)
    broken = tmp_path / f"broken.{suffix}"
    Image.open(tmp_path / "0.png").save(broken)
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"broken\.{suffix}: cannot be read as an image"):
        read(tmp_path)


def test_pixels_without_a_range_are_refused(tmp_path):
    Image.new("F", (12, 10), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float\.tiff: .* mode 'F' have no known range"):
        read(tmp_path)


def test_a_preprocessing_for_grey_images_is_refused(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="'fashion' takes images of 1 channels, found 3"):
        image_folder(tmp_path, "fashion")
