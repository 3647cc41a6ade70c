"""`gradacc play`: a page on which the kit's own loop trains a small model, and is watched as it does.

`problems.py` has the data and models, `loops.py` what is trained by, `session.py` a person's run: it knows no
page. `workers.py` runs each in a process of its own; `pictures.py` draws what a session shows, `page.py` puts
it on a page of Gradio's.
"""
