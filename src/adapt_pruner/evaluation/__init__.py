"""What a model is worth: benchmarks, perplexity, and what its size buys."""

from .measure import EvaluationListener as EvaluationListener
from .measure import evaluate as evaluate
from .perplexity import Perplexity as Perplexity
from .perplexity import evaluation_texts as evaluation_texts
from .perplexity import perplexity as perplexity
from .scores import Evaluation as Evaluation
from .scores import Score as Score
from .speed import Speed as Speed
from .speed import compare_speed as compare_speed
from .store import ResultStore as ResultStore
