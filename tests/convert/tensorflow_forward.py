"""BERT's forward pass in TensorFlow's own operations, from a checkpoint and nothing else.

Run as a script in a process without torch: arguments are the folder of the checkpoint, a .npz with
`input_ids` and `attention_mask` [B, S], and the .npz to write: `hidden` [B, S, D] and, if the
checkpoint has the head, `logits` [B, S, V].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

folder, source, target = map(Path, sys.argv[1:])
checkpoint = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(folder)))
config = json.loads((folder / "bert_config.json").read_text())
HEADS, LAYERS = config["num_attention_heads"], config["num_hidden_layers"]


def variable(name):
    return tf.constant(checkpoint.get_tensor(name))


def dense(x, name):
    return tf.matmul(x, variable(f"{name}/kernel")) + variable(f"{name}/bias")


def layer_norm(x, name):
    mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
    gamma, beta = variable(f"{name}/LayerNorm/gamma"), variable(f"{name}/LayerNorm/beta")
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-12)


def gelu(x):
    return x * 0.5 * (1.0 + tf.math.erf(x / tf.sqrt(2.0)))


def heads(x):
    return tf.transpose(tf.reshape(x, [*x.shape[:2], HEADS, x.shape[2] // HEADS]), [0, 2, 1, 3])


data = np.load(source)
ids, mask = tf.constant(data["input_ids"]), tf.constant(data["attention_mask"], tf.float32)
words = variable("bert/embeddings/word_embeddings")
x = tf.gather(words, ids)
x += variable("bert/embeddings/position_embeddings")[: ids.shape[1]]
x += variable("bert/embeddings/token_type_embeddings")[0]
x = layer_norm(x, "bert/embeddings")
for number in range(LAYERS):
    room = f"bert/encoder/layer_{number}"
    query, key, value = (
        heads(dense(x, f"{room}/attention/self/{name}")) for name in ("query", "key", "value")
    )
    scores = tf.matmul(query, key, transpose_b=True) / float(query.shape[-1]) ** 0.5
    weights = tf.nn.softmax(scores + (1.0 - mask[:, None, None, :]) * -10000.0)
    context = tf.reshape(tf.transpose(tf.matmul(weights, value), [0, 2, 1, 3]), x.shape)
    x = layer_norm(dense(context, f"{room}/attention/output/dense") + x, f"{room}/attention/output")
    inner = gelu(dense(x, f"{room}/intermediate/dense"))
    x = layer_norm(dense(inner, f"{room}/output/dense") + x, f"{room}/output")
result = {"hidden": x.numpy()}
if checkpoint.has_tensor("cls/predictions/output_bias"):
    y = layer_norm(gelu(dense(x, "cls/predictions/transform/dense")), "cls/predictions/transform")
    y = tf.matmul(y, words, transpose_b=True) + variable("cls/predictions/output_bias")
    result["logits"] = y.numpy()
np.savez(target, **result)
