"""`gradacc play`: a page that shows gradacc's loop while it trains a small model.

- `settings.py`: the settings of a run and their allowed values
- `toy_tasks.py`: data and models
- `loops.py`: gradacc's loop, and one loop for each mistake
- `model_runner.py`: a model with its optimizer and scheduler
- `session.py`: one training run, as plain data, independent of the page
- `preload.py`: the imports that all worker processes share
- `workers.py`: one process for each run
- `sessions.py`: the actions of each browser session
- `drawing.py`: the pictures, as HTML
- `tour.py`: the texts of the guided tour
- `page.py`: the page, with Gradio
- `command.py`: the command line
- `animation.py`: a run as an animated SVG, for `--film`
- `space.py`: the page as a Space on the Hub, for `--space`
"""
