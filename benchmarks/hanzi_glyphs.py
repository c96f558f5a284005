"""Draw Chinese characters, glyphs of very many classes, from Debian's font packages alone.

    python benchmarks/hanzi_glyphs.py OUT [--packages DIR]

Writes PNGs of 32 x 32 in gray and ``OUT/hanzi.csv`` (image, label, client, split), which ``fedss
train --data csv --data-path OUT/hanzi.csv --image-size 28`` reads. A class is a character, a client
a page of 40 training characters in one design. Of 47 designs of free fonts, each character is in 8
that are drawn by lot; the 16,000 characters are those that most designs have. ``--characters 0``
takes all that enough designs have, 27,553. Characters of validation and test are in no page.

It needs Debian 12 (apt-get after an ``apt-get update``, dpkg-deb; not root) and ``pip install
fonttools``. The first run fetches 586 MB, which DIR keeps. Takes two minutes.

SHA-256 of all pixels and the manifest with numpy 2.4.6, Pillow 13.0.0 and its FreeType 2.14.3:
16,000: 053d2fe88aebc19a0de3c2d72cac61100e69760c7ce19d3db56bc3a5a1a43194
27,553: b04973c1adf31d87e29eb71247c4b0ea02209f1b620711a6511aafeb0acf2500
"""

import csv
import hashlib
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import common
import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

try:
    from fontTools.ttLib import TTFont
except ImportError:
    raise SystemExit("fontTools is missing: pip install fonttools") from None

# A package and its designs: a file of a font, and which face of it where that is not the first.
# Fonts that differ from one of these in weight, width or kana alone are left out, but for some
# thin and black ones. Faces 2 and 3 of Noto have simplified and traditional Chinese shapes.
PACKAGES = (
    "fonts-aoyagi-kouzan-t AoyagiKouzanT.ttf",
    "fonts-aoyagi-soseki aoyagi-soseki.ttf",
    "fonts-arphic-gbsn00lp gbsn00lp.ttf",
    "fonts-arphic-gkai00mp gkai00mp.ttf",
    "fonts-arphic-ukai ukai.ttc",
    "fonts-arphic-uming uming.ttc",
    "fonts-babelstone-han BabelStoneHan.ttf",
    "fonts-cns11643-kai TW-Kai-98_1.ttf",
    "fonts-cns11643-sung TW-Sung-98_1.ttf",
    "fonts-cwtex-fs cwfs.ttf",
    "fonts-cwtex-heib cwheib.ttf",
    "fonts-cwtex-kai cwkai.ttf",
    "fonts-cwtex-ming cwming.ttf",
    "fonts-cwtex-yen cwyen.ttf",
    "fonts-dejima-mincho dejima-mincho-r227.ttf",
    "fonts-droid-fallback DroidSansFallbackFull.ttf",
    "fonts-hanazono HanaMinA.ttf",
    "fonts-horai-umefont ume-pmo3.ttf",
    "fonts-ipamj-mincho ipamjm.ttf",
    "fonts-kiloji kiloji.ttf",
    "fonts-komatuna komatuna.ttf",
    "fonts-konatu Konatu.ttf",
    "fonts-kouzan-mouhitsu KouzanBrushFontSousyo.ttf kouzan-mouhitsu.ttf "
    "kouzan-mouhitsu-gyosho.ttf",
    "fonts-lxgw-wenkai LXGWWenKai-Light.ttf",
    "fonts-migmix migmix-1p-regular.ttf",
    "fonts-monapo monapo.ttf",
    "fonts-motoya-l-cedar MTLc3m.ttf",
    "fonts-motoya-l-maruberi MTLmr3m.ttf",
    "fonts-mplus Mplus1-Black.otf Mplus1-Regular.otf",
    "fonts-noto-cjk NotoSansCJK-Regular.ttc#2 NotoSerifCJK-Regular.ttc#2",
    "fonts-noto-cjk-extra NotoSansCJK-Black.ttc NotoSansCJK-Thin.ttc#3 NotoSerifCJK-Black.ttc",
    "fonts-oradano-mincho-gsrr OradanoGSRR.ttf",
    "fonts-sawarabi-gothic sawarabi-gothic-medium.ttf",
    "fonts-sawarabi-mincho sawarabi-mincho-medium.ttf",
    "fonts-seto setofont.ttf",
    "fonts-takao-gothic TakaoGothic.ttf",
    "fonts-takao-mincho TakaoMincho.ttf",
    "fonts-umeplus umeplus-gothic.ttf",
    "fonts-vlgothic VL-Gothic-Regular.ttf",
    "fonts-wqy-zenhei wqy-zenhei.ttc",
    "fonts-yozvox-yozfont-standard-kana YOzRS_.ttf",
)
# CJK unified ideographs, and their extension A.
BLOCKS = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000))
# Drawn at 4 times the size, an em being 0.8 of the side.
SIDE, TIMES, EM, PAGE = 32, 4, 102, 40
TEST, VALIDATION = 3243 / 16000, 1570 / 16000  # Shares of the characters.
# The name of a design, and a code point.
Picture: TypeAlias = tuple[str, int]
Digest: TypeAlias = "hashlib._Hash"


class Design(NamedTuple):
    """A face of a font, and the code points that it draws."""

    name: str
    font: ImageFont.FreeTypeFont
    codes: set[int]


def run(words: Sequence[str], folder: Path) -> None:
    """A command of Debian's; without it, or where it fails, a line says so."""
    if not shutil.which(words[0]):
        raise SystemExit(f"{words[0]} is missing: this script needs Debian, or a container of it")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed: {done.stderr.strip()[-200:]}")


def fetch(folder: Path) -> list[Path]:
    """The packages; those that the folder lacks are downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [line.split()[0] for line in PACKAGES]
    if missing := [name for name in names if not list(folder.glob(f"{name}_*.deb"))]:
        print(f"fetching {len(missing)} packages", flush=True)
        run(["apt-get", "download", *missing], folder)
    return [max(folder.glob(f"{name}_*.deb")) for name in names]


def read_design(file: str, unpacked: Path) -> Design:
    """A face, and which characters of the blocks it draws: many fonts have blanks for some."""
    name, _, face = file.partition("#")
    path = next(unpacked.rglob(name), None)
    if path is None:
        raise SystemExit(f"{name} is in none of the packages: they are of another release")
    number = int(face or 0)
    # The basic layout is in every build of Pillow.
    font = ImageFont.truetype(path, EM, number, layout_engine=ImageFont.Layout.BASIC)
    with TTFont(path, fontNumber=number, lazy=True) as tables:
        known = tables.getBestCmap()
    boxes = {c: font.getbbox(chr(c)) for block in BLOCKS for c in block if c in known}
    # The box of a blank has a width, but no height.
    return Design(path.stem, font, {c for c, box in boxes.items() if box[1] < box[3]})


def draw(font: ImageFont.FreeTypeFont, code: int) -> Image.Image:
    """The character in black on white, the box of its ink in the middle."""
    side = TIMES * SIDE
    left, top, right, bottom = font.getbbox(chr(code))
    place = ((side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top)
    image = Image.new("L", (side, side), 255)
    ImageDraw.Draw(image).text(place, chr(code), fill=0, font=font)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def choose_characters(designs: Iterable[Design], characters: int, least: int) -> list[int]:
    """Those that most designs have, in order of their code points; 0: all that enough have."""
    counts = Counter(code for design in designs for code in design.codes)
    enough = sorted(code for code, count in counts.items() if count >= least)
    if characters > len(enough):
        raise SystemExit(f"only {len(enough):,} characters are in {least} designs")
    return sorted(sorted(enough, key=lambda code: -counts[code])[: characters or None])


def choose_designs(
    designs: Sequence[Design], code: int, count: int, rng: np.random.Generator
) -> list[Design]:
    """Some of those that have the character, by lot, in their order."""
    having = [design for design in designs if code in design.codes]
    return [having[at] for at in sorted(rng.choice(len(having), count, replace=False))]


def splits_of(codes: Sequence[int], rng: np.random.Generator) -> dict[int, str]:
    """A split for each character, by lot."""
    names = ["test"] * round(TEST * len(codes)) + ["validation"] * round(VALIDATION * len(codes))
    names += ["train"] * (len(codes) - len(names))
    return {codes[at]: name for at, name in zip(rng.permutation(len(codes)), names, strict=True)}


def draw_all(chosen: Mapping[int, Sequence[Design]], out: Path) -> tuple[list[Picture], Digest]:
    """Write the pictures: of chosen designs that draw a character alike, only the first one's.

    Returns which there are, and the hash of their pixels.
    """
    drawn, digest = [], hashlib.sha256()
    for code, designs in chosen.items():
        pictures: dict[bytes, tuple[str, Image.Image]] = {}
        for design in designs:
            image = draw(design.font, code)
            pictures.setdefault(image.tobytes(), (design.name, image))
        for pixels, (name, image) in sorted(pictures.items(), key=lambda item: item[1][0]):
            path = out / path_of(name, code)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            digest.update(pixels)
            drawn.append((name, code))
    return drawn, digest


def path_of(name: str, code: int) -> str:
    digits = f"{code:04x}"
    return f"{name}/{digits[:2]}/{digits}.png"


def pages_of(drawn: Iterable[Picture], rng: np.random.Generator) -> dict[Picture, str]:
    """The client of each picture: a design's pictures are shuffled and cut into pages."""
    codes: dict[str, list[int]] = {}
    for name, code in drawn:
        codes.setdefault(name, []).append(code)
    return {
        (name, code): f"{name} page {at // PAGE:04d}"
        for name in sorted(codes)
        for at, code in enumerate(rng.permutation(codes[name]).tolist())
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("out", type=Path, help="folder for pictures and manifest")
    parser.add_argument("--packages", type=Path, help="folder of packages (OUT/packages)")
    parser.add_argument("--characters", type=int, default=16000, help="how many; 0: all")
    parser.add_argument("--designs", type=int, default=8, help="designs of each character")
    options = parser.parse_args()
    manifest = options.out / "hanzi.csv"
    if manifest.exists():
        raise SystemExit(f"{manifest} is there already: choose another folder")
    archives = fetch(options.packages or options.out / "packages")
    with tempfile.TemporaryDirectory(dir=archives[0].parent) as folder:
        print(f"unpacking {len(archives)} packages", flush=True)
        for archive in archives:
            run(["dpkg-deb", "-x", archive.name, folder], archive.parent)
        files = [file for line in PACKAGES for file in line.split()[1:]]
        designs = [read_design(file, Path(folder)) for file in files]
        codes = choose_characters(designs, options.characters, options.designs)
        print(f"drawing {len(codes):,} characters in {len(designs)} designs", flush=True)
        rng = np.random.default_rng(0)
        chosen = {code: choose_designs(designs, code, options.designs, rng) for code in codes}
        drawn, digest = draw_all(chosen, options.out)
    splits = splits_of(codes, rng)
    pages = pages_of([(name, code) for name, code in drawn if splits[code] == "train"], rng)
    with open(manifest, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "client", "split"))
        for name, code in drawn:
            label, client = f"U+{code:04X} {chr(code)}", pages.get((name, code), "held out")
            writer.writerow((path_of(name, code), label, client, splits[code]))
    digest.update(manifest.read_bytes())
    for split in ("train", "validation", "test"):
        of = [code for _, code in drawn if splits[code] == split]
        print(f"{split:<11}{len(set(of)):>7,} characters{len(of):>9,} pictures")
    copies = len(codes) * options.designs - len(drawn)
    print(f"{len(set(pages.values())):,} clients, {copies} copies left out")
    print(f"FreeType {features.version('freetype2')}, SHA-256 {digest.hexdigest()}")


if __name__ == "__main__":
    main()
