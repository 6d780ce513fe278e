"""Data sets of a few small pictures in every layout, for the tests."""

import numpy as np
from PIL import Image

from common.images import Sample, load_image
from common.label_maps import load_label_map
from common.tasks import get_task

# VOC's first four colours, then grey
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [90] * 756
LAYOUTS = {  # (split, folder of the images, folder of the masks)
    "sbu": [("train", "SBUTrain4KRecoveredSmall/ShadowImages",
             "SBUTrain4KRecoveredSmall/ShadowMasks"),
            ("test", "SBU-Test/ShadowImages", "SBU-Test/ShadowMasks")],
    "msd": [("train", "train/image", "train/mask"), ("test", "test/image", "test/mask")],
    "duts": [("train", "DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask"),
             ("test", "DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask")],
    "folder": [("train", "train/images", "train/masks"), ("test", "test/images", "test/masks")],
}
VOC = "VOCdevkit/VOC2012"


def task_of(name):
    return get_task(name, prompt="dog" if name == "folder" else "")


def save(path, values, **options):
    """Writes a picture with Pillow's `options`. values: an array, or an Image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
    picture.save(path, **options)
    return path


def half(height=6, width=8, top=255):
    """A mask whose left half is foreground."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = top
    return mask


def picture(height=6, width=8, value=90):
    return np.full((height, width, 3), value, np.uint8)


def pair(images, masks, name):
    """Writes an image and its mask into two folders."""
    save(images / f"{name}.jpg", picture())
    save(masks / f"{name}.png", half())


def make(root, name):
    """A data set of that layout with two samples in each split."""
    for split, images, masks in LAYOUTS[name]:
        for stem in ("b", "a"):
            pair(root / images, root / masks, f"{split}_{stem}")
    return root


def palette_mask(indices):
    mask = Image.fromarray(np.asarray(indices, np.uint8))
    mask.putpalette(PALETTE)
    return mask


def make_voc(root, train=("c", "a"), test=("b",), unlisted=("unlisted",)):
    """A VOC with these samples in its lists, and images that are in no list."""
    for name in (*train, *test):
        save(root / VOC / "JPEGImages" / f"{name}.jpg", picture(2, 4))
        save(root / VOC / "SegmentationClass" / f"{name}.png",
             palette_mask([[0, 1, 2, 255], [0, 0, 20, 255]]))
    for name in unlisted:
        save(root / VOC / "JPEGImages" / f"{name}.jpg", picture(2, 4))
    lists = root / VOC / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(train) + "\n")
    (lists / "val.txt").write_text("\r\n".join(test) + "\r\n")
    return root


def one(tmp_path, image=None, mask=None, exif=b"", mask_name="x.png"):
    """A sample whose files are written here: an image and a mask (arrays or Images)."""
    image = picture() if image is None else image
    mask = half() if mask is None else mask
    image_file = save(tmp_path / "images" / "x.jpg", image, exif=exif)
    mask_file = save(tmp_path / "masks" / mask_name, mask)
    return Sample("x", image_file, mask_file, "train")


def label_map_of(sample, task="folder"):
    return load_label_map(sample, task_of(task), load_image(sample.image).shape[:2])


# Where the stored top left corner is seen, by EXIF 2.3's table of orientations.
SEEN_AT = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0),
           5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


def photograph(orientation):
    """16 x 48 stored pixels whose top left 8 x 8 are white, and the EXIF to save them with."""
    stored = np.zeros((16, 48), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored, exif


def seen(orientation):
    """The label map of a photograph's white corner as it is viewed."""
    label_map = np.zeros((48, 16) if orientation >= 5 else (16, 48), np.uint8)
    edge = {0: slice(None, 8), -1: slice(-8, None)}  # the 8 pixels at either end of a side
    row, column = SEEN_AT[orientation]
    label_map[edge[row], edge[column]] = 1
    return label_map
