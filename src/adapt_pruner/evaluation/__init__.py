"""What a model is worth: perplexity, and what its size buys."""

from .perplexity import Perplexity as Perplexity
from .perplexity import perplexity as perplexity
from .speed import Speed as Speed
from .speed import compare_speed as compare_speed
