"""The style sheet of page.py: by day and by night, on a phone and on a wide screen, without a script.

Blue and orange-red tell splits apart for colour-blind eyes too, and shapes do so besides (charts.py).
"""

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
a { color: var(--link); }
p { margin: .5rem 0; max-width: 48rem; }
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
.charts figure, .sample { background: var(--panel); border-radius: .4rem; padding: .6rem; }
figure { margin: 0; }
figcaption { font-size: .8rem; }
svg { display: block; max-width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .ground { fill: var(--panel); } svg .grid { stroke: var(--line); }
svg circle.train, svg .cell { fill: var(--train); } svg .held { fill: var(--held); }
svg circle.train, svg .held { stroke: var(--paper); stroke-width: .7; }
svg a .train, svg a .held { stroke: var(--ink); stroke-width: 2; }
svg.map { font-size: 15px; } svg.histogram, svg.bars { width: 100%; }
svg .bar { fill: var(--bar); } svg .axis { stroke: var(--ink); } svg .name { font-weight: 700; }
svg .table-range { fill: var(--band); } svg .table-mean { stroke: var(--train); stroke-width: 2; }
svg .own-mean { stroke: var(--held); stroke-width: 2; stroke-dasharray: 4 2; }
.key { display: inline-block; width: 1.6rem; height: .8rem; vertical-align: -.05rem; margin: 0 .3rem 0 .8rem; }
.key.range { background: var(--band); border-left: 2px solid var(--train); }
.key.own { border-left: 2px dashed var(--held); width: .2rem; }
.key.train { background: var(--train); border-radius: 50%; width: .7rem; height: .7rem; }
.key.held { background: var(--held); transform: rotate(45deg); width: .6rem; height: .6rem; }
.sample { margin: 0 0 1rem; }
.sample p { margin: .15rem 0; font-size: .85rem; }
.reasons { margin: .3rem 0; padding-left: 1.1rem; font-size: .9rem; color: var(--warn); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .4rem 0 0; padding: 0;
  font-size: .8rem; }
.strips { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; }
.strips > div { max-width: 100%; }
h5 { font-size: .8rem; margin: .3rem 0 .15rem; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; }
.strip figure { width: 6rem; max-width: 100%; } .large figure { width: 13rem; }
.strip figcaption { line-height: 1.2; font-size: .75rem; }
.stack { position: relative; background: #d1d1d1; }
.stack img { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; }
.stack .over { position: absolute; inset: 0; }
body:has(#overlays:not(:checked)) .stack img + .over { visibility: hidden; }
details summary { cursor: pointer; margin: .5rem 0; }
:focus-visible { outline: 3px solid var(--train); outline-offset: 2px; }
"""
