"""The style sheet of all pages: by day and by night, on a phone and on a wide screen, without a script.

Blue and orange-red tell things apart for colour-blind eyes too; curves have dashes besides.
"""

# Of curves, by day and by night: each at 4.5 to 1 or more against its background.
_DAY = ("#0063a8", "#c2410c", "#0f7a4d", "#8a3fa8", "#7a5c00", "#b01768", "#3f5a78", "#505050")
_NIGHT = ("#5ab4f0", "#ff9a5c", "#4fcf93", "#d6a2f2", "#e3c84a", "#ff86ba", "#a9c1e0", "#c0c0c0")
_DASHES = ("none", "7 3", "2 2", "9 2 2 2", "none", "7 3", "2 2", "9 2 2 2")


def _curves() -> str:
    day, night = ("".join(f"--c{place}: {colour}; " for place, colour in enumerate(of)) for of in (_DAY, _NIGHT))
    classes = "\n".join(
        f"svg .curve.c{place} {{ stroke: var(--c{place}); stroke-dasharray: {dash}; }} "
        f"svg .dot.c{place} {{ fill: var(--c{place}); }}"
        for place, dash in enumerate(_DASHES)
    )
    return f":root {{ {day}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {night}}} }}\n{classes}\n"


STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --faint: #5b646d; --paper: #fff; --panel: #f3f5f7; --line: #d5dade;
  --train: #0063a8; --held: #c2410c; --bar: #6b7c8c; --band: #0063a826; --link: #0056a0; --warn: #9a3b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --faint: #a3adb7; --paper: #14181c; --panel: #1f252b;
  --line: #3a434c; --train: #5ab4f0; --held: #ff9a5c; --bar: #90a2b3; --band: #5ab4f033; --link: #7cc4ff;
  --warn: #ffb27d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .3rem 0; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .5rem; }
h4 { font-size: 1rem; margin: 0; }
h5 { font-size: .8rem; margin: .3rem 0 .15rem; }
a { color: var(--link); }
p { margin: .5rem 0; max-width: 48rem; }
.guide { margin: .5rem 0 .9rem; padding: .1rem 0 .1rem .9rem; max-width: 48rem; list-style: none;
  border-left: 3px solid var(--line); }
.beside { display: flex; flex-wrap: wrap; gap: .8rem 2.5rem; align-items: flex-start; }
.beside > * { min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(11rem, 46%), 1fr)); gap: .8rem;
  margin: 1rem 0; padding: 0; list-style: none; }
.tiles li { background: var(--panel); border-radius: .4rem; padding: .6rem .8rem; font-size: .85rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.3; color: var(--train); white-space: nowrap; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .6rem 0; }
.faint, figcaption, caption { color: var(--faint); }
caption { text-align: left; padding-bottom: .3rem; font-size: .9rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
td.words { min-width: 11rem; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.share { min-width: 7rem; }
.meter { display: block; height: .6rem; margin-top: .35rem; background: var(--bar); min-width: 1px; }
.swatch { display: inline-block; width: .9rem; height: .9rem; vertical-align: -.1rem; border: 1px solid var(--faint);
  margin-right: .4rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: .8rem; }
.charts { margin-bottom: .6rem; }
.charts figure, .panel { background: var(--panel); border-radius: .4rem; padding: .6rem; }
figure { margin: 0; }
figcaption { font-size: .8rem; }
svg { display: block; max-width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .ground { fill: var(--panel); } svg .grid { stroke: var(--line); }
svg.histogram, svg.bars, svg.curves { width: 100%; }
svg .bar { fill: var(--bar); } svg .axis { stroke: var(--ink); } svg .name { font-weight: 700; }
svg .cell { fill: var(--train); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .4rem 0 0; padding: 0;
  font-size: .8rem; }
.strips { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; }
.strips > div { max-width: 100%; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; }
.strip figure { width: 6rem; max-width: 100%; } .large figure { width: 13rem; }
.strip figcaption { line-height: 1.2; font-size: .75rem; }
.stack { position: relative; background: #d1d1d1; }
.stack img { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; }
details summary { cursor: pointer; margin: .5rem 0; }
:focus-visible { outline: 3px solid var(--train); outline-offset: 2px; }
svg .curve { fill: none; stroke-width: 1.8; }
svg.matrix { max-width: none; } svg .empty { fill: none; stroke: var(--line); }
""" + _curves()
