"""What the documentation says and shows works: commands, the notebook, links, pictures.

In a block of ```bash every line is run as it stands, in bash. Where one cannot be run here, a line above the
block says what it needs, `<!-- needs: a GPU -->`; only options of its commands are looked at then (pages.py
has the list of reasons). A page's blocks run in order, in a copy of the repository that has a short run in
`outputs/` and the files of scratch.py; training ends after two steps and draws no curves.
"""
