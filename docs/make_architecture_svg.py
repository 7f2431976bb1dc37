"""Writes docs/architecture.svg, the way of one sample from a record to the loss. Run: python docs/make_architecture_svg.py"""
# ruff: noqa: E501

import pathlib
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1180, 640
HOST, DEVICE, TEACHER, LOSS = "#dbe9f6", "#e3f1df", "#f6ead2", "#f6dcdc"

# (x, y, width, height, fill, title, lines)
BOXES = [
    (20, 40, 190, 150, HOST, "record", ["hr: 256-px tiles", "s2, s1: one block a date", "valid, cloud bits", "days, orbit, osm"]),
    (20, 250, 190, 70, HOST, "procedural scene", ["the same reader"]),
    (260, 40, 210, 150, HOST, "MultiView (host)", ["anchor of 24 cells, dates drawn", "2 global, 4 local boxes", "crop, resize, turn, flip", "masks, label shares, affine"]),
    (260, 250, 210, 70, HOST, "Grain pipeline", ["mix, shuffle, batch, exact state"]),
    (520, 40, 190, 70, DEVICE, "photometric, normalise", ["inside jit, per modality"]),
    (520, 140, 190, 130, DEVICE, "unified backbone", ["tokenizer per modality", "2 Swin V2 stages, APM", "2 global stages, prompts", "experts in the last blocks"]),
    (520, 300, 190, 80, DEVICE, "fusion", ["per cell: all dates and sensors", "with day of year: one feature"]),
    (520, 410, 190, 70, DEVICE, "query decoder", ["R semantic queries a view"]),
    (520, 520, 190, 90, TEACHER, "teacher", ["moving average of all of this", "fp32, no gradient"]),
    (780, 140, 170, 100, DEVICE, "heads", ["pixel, object, image", "for modalities and fused"]),
    (780, 410, 170, 70, DEVICE, "query head", ["prototype logits"]),
    (780, 300, 170, 80, DEVICE, "text head", ["feature in the space", "of the class names"]),
    (780, 520, 170, 90, TEACHER, "targets", ["moved on the ground", "Sinkhorn-Knopp, all rows"]),
    (1010, 140, 150, 100, LOSS, "L_MGCL", ["matched by ground", "position"]),
    (1010, 300, 150, 80, LOSS, "L_ITA", ["osm label shares"]),
    (1010, 410, 150, 70, LOSS, "L_QSACL", ["same query only"]),
    (1010, 520, 150, 90, LOSS, "loss", ["weighted sum", "+ router terms"]),
]  # fmt: skip
ARROWS = [
    ((210, 115), (260, 115)), ((210, 285), (235, 285), (235, 130), (260, 130)), ((365, 190), (365, 250)),
    ((470, 285), (495, 285), (495, 75), (520, 75)), ((615, 110), (615, 140)), ((615, 270), (615, 300)),
    ((615, 380), (615, 410)), ((710, 190), (780, 190)), ((710, 340), (780, 340)), ((710, 445), (780, 445)),
    ((710, 565), (780, 565)), ((950, 190), (1010, 190)), ((950, 340), (1010, 340)), ((950, 445), (1010, 445)),
    ((950, 565), (980, 565), (980, 205), (1010, 205)), ((980, 458), (1010, 458)), ((1085, 480), (1085, 520)),
]  # fmt: skip


def main():
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        '<defs><marker id="a" markerWidth="9" markerHeight="7" refX="8" refY="3.5" orient="auto">'
        '<path d="M0,0 L9,3.5 L0,7 z" fill="#444"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for x, text in ((20, "on disk"), (260, "on the host"), (520, "on the device, one jit"), (1010, "objectives")):
        parts.append(f'<text x="{x}" y="24" fill="#666" font-style="italic">{text}</text>')
    for points in ARROWS:
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#444" stroke-width="1.4" marker-end="url(#a)"/>')
    for x, y, width, height, fill, title, lines in BOXES:
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="#777"/>')
        parts.append(f'<text x="{x + 12}" y="{y + 23}" font-weight="bold">{escape(title)}</text>')
        for i, line in enumerate(lines):
            parts.append(f'<text x="{x + 12}" y="{y + 45 + 20 * i}" font-size="11.5">{escape(line)}</text>')
    parts.append("</svg>")
    pathlib.Path(__file__).with_name("architecture.svg").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
