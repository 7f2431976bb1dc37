"""What page.py adds to the style sheet of all pages: marks of splits, ranges of the modality table, overlays.

Blue and orange-red tell splits apart for colour-blind eyes too, and shapes do so besides (charts.py).
"""

STYLE = """
svg circle.train { fill: var(--train); } svg .held { fill: var(--held); }
svg circle.train, svg .held { stroke: var(--paper); stroke-width: .7; }
svg a .train, svg a .held { stroke: var(--ink); stroke-width: 2; }
svg.map { font-size: 15px; }
svg .table-range { fill: var(--band); } svg .table-mean { stroke: var(--train); stroke-width: 2; }
svg .own-mean { stroke: var(--held); stroke-width: 2; stroke-dasharray: 4 2; }
.key { display: inline-block; width: 1.6rem; height: .8rem; vertical-align: -.05rem; margin: 0 .3rem 0 .8rem; }
.key.range { background: var(--band); border-left: 2px solid var(--train); }
.key.own { border-left: 2px dashed var(--held); width: .2rem; }
.key.train { background: var(--train); border-radius: 50%; width: .7rem; height: .7rem; }
.key.held { background: var(--held); transform: rotate(45deg); width: .6rem; height: .6rem; }
.sample { background: var(--panel); border-radius: .4rem; padding: .6rem; margin: 0 0 1rem; }
.sample p { margin: .15rem 0; font-size: .85rem; }
.reasons { margin: .3rem 0; padding-left: 1.1rem; font-size: .9rem; color: var(--warn); }
.stack .over { position: absolute; inset: 0; }
body:has(#overlays:not(:checked)) .stack img + .over { visibility: hidden; }
"""
