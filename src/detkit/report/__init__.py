"""One page about a comparison: a file that opens anywhere, fetches nothing, prints, and reads without scripts.

`page` puts the parts together, `tables` has the numbers, `charts` draws them, `pictures` shows images with boxes.
Tables, charts and boxes are HTML and SVG made here; the script of the page only hides and shows what is there.
"""

from detkit.report.page import write_page

__all__ = ["write_page"]
