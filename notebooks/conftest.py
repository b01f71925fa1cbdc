"""nbval: what is not compared between a committed output and a fresh one.

Progress bars and warnings go to stderr; HTML changes with the pandas version (the plain text of a
table is compared); vector images differ in ids and dates (the text with the figure's size is
compared).
"""


def pytest_collectstart(collector):
    if getattr(collector, "path", None) and collector.path.suffix == ".ipynb":
        collector.skip_compare += ("stderr", "text/html", "image/svg+xml", "application/pdf")
