"""`report.html`: one self-contained page per run, and one per sweep. Needs neither torch nor a network.

    read.py       the files of a run directory -> `Run`
    views         one file each: verdict, steps, load, traffic, layout, tokens, curves, setup; sweeps for a sweep
    document.py   sections -> the file, with plotly's own JavaScript in it
    page.js       inflates the library, draws a chart when it comes into view, follows light, dark and print

A view returns None if the run has no data for it, and is then left out.
"""

from moecompile.report.page.write import try_report, write_report

__all__ = ["try_report", "write_report"]
