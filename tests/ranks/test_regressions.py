"""Chains that once gave other values than the unsharded run, or failed: each as ``make fuzz`` showed it."""

from __future__ import annotations

import pytest

from tests.support.chains.chain import Chain, Input, compare

CASES = {
    "unpooling of channels that a rank has none of": Chain(
        3,
        (Input((4, 5, 7), 1, (0, 0, 5, 5)),),
        ("x, i = F.max_pool1d(x, 1, return_indices=True); x = F.max_unpool1d(x, i, 1)",),
    ),
    "a plain input with sharded parameters": Chain(
        1,
        (Input((1, 2, 1), 1, (0, 2)), Input((1,), 0, (0, 1)), Input((1,), 0, (0, 1))),
        ("x = x.reshape(2, 1)", "x = x.repeat_interleave(2, 0)", "x = F.group_norm(x, 1, t1, t2)"),
    ),
    "sharded parameters of a norm": Chain(
        2, (Input((2, 4, 6), 1, (0, 2, 4)), Input((6,), 0, (0, 1, 6))), ("x = F.layer_norm(x, (6,), t1)",)
    ),
    "a sharded bias": Chain(
        2,
        (Input((2, 4, 6), 1, (0, 2, 4)), Input((3, 6)), Input((3,), 0, (0, 2, 3))),
        ("x = F.linear(x, t1, t2)",),
    ),
    "a crop beyond the rows, padded on the other side": Chain(
        3, (Input((1, 6, 3, 8), 2, (0, 0, 1, 3), last=True),), ("x = F.pad(x, (0, 0, 2, -4), 'reflect')",)
    ),
    "a crop of all rows that are then repeated": Chain(
        2, (Input((2, 6, 1, 1), 3, (0, 1, 1)),), ("x = F.pad(x, (-1, 3, 0, 0), 'replicate')",)
    ),
    "a crop beyond other dims of a rank without rows": Chain(
        4,
        (Input((1, 6, 1, 8), 1, (0, 0, 6, 6, 6), last=True),),
        ("x = x.reshape(1, 2, 1, 6, 4)", "x = F.pad(x, (3, 1, 1, 0, -2, 2), 'replicate')"),
    ),
    "a cropping pad is no view": Chain(
        3, (Input((1, 6, 3, 8), 2, (0, 0, 1, 3)),), ("z = x; x = F.pad(x, (0, 0, -1, -1)); x.mul_(2)",)
    ),
    "split at places that fall": Chain(
        2,
        (Input((2, 4, 7, 1), 2, (0, 0, 7)),),
        ("a, *b = x.tensor_split((3, 0), -2); x = torch.cat([a, *b, a.tanh()], -2)",),
    ),
    "channels last, gathered where a rank has one channel": Chain(
        3,
        (Input((1, 3, 8, 7), 1, (0, 1, 3, 3), last=True), Input((1, 3, 2, 3)), Input((1,))),
        ("x = F.conv2d(x, t1, t2, (1, 3), (1, 2), 1, 1)",),
    ),
    "a mask alone is sharded": Chain(
        3,
        (Input((5, 3, 6, 6), 2, (0, 2, 4, 6)), Input((6, 6), 1, (0, 3, 6, 6))),
        ("x = x.mT @ x / 4", "x = F.scaled_dot_product_attention(x, x.flip(-2), x * 2, t1)"),
    ),
    "one sample a rank": Chain(2, (Input((2, 1), 0, (0, 1, 2)),), ("x = F.group_norm(x, 1)",)),
    # What is written to a reshape that copies on one device does not reach its source, whatever a rank's rows look like.
    "written to a copy, one column": Chain(
        2, (Input((2, 3, 1, 6), 3, (0, 5, 6), last=True),), ("x = x.clone(); x.flatten(1).sub_(1)",)
    ),
    "written to a copy of a slice of rows": Chain(
        2, (Input((2, 3, 4, 6), 2, (0, 1, 4)),), ("x = x.clone(); x[:, :, 1:].flatten(1).sub_(1)",)
    ),
    "written to a copy of every second row": Chain(
        2, (Input((2, 3, 4, 6), 2, (0, 1, 4)),), ("x = x.clone(); x[:, :, ::2].flatten(1).sub_(1)",)
    ),
    "written to a copy of every second channel": Chain(
        2, (Input((2, 3, 4, 6), 2, (0, 1, 4)),), ("x = x.clone(); x[:, ::2].flatten(1).sub_(1)",)
    ),
    "written to what contiguous() copied": Chain(
        2, (Input((2, 3, 4, 6), 2, (0, 1, 4)),), ("x = x.clone(); x[:, :, 1:].contiguous().sub_(1)",)
    ),
    "written to what contiguous() did not copy": Chain(
        2, (Input((1, 1, 4, 6), 2, (0, 1, 4)),), ("x = x.clone(); x[:, :, 1:].contiguous().sub_(1)",)
    ),
    "written to a contiguous transposition of one row": Chain(
        2, (Input((2, 3, 4, 6), 2, (0, 1, 4)),), ("z = x.transpose(1, 2).clone(); x = z.contiguous(); x.sub_(1)",)
    ),
    "written to a copy, dims moved, one row": Chain(
        3,
        (Input((2, 5, 8, 6), 3, (0, 2, 4, 6), last=True), Input((2, 5, 2, 2))),
        (
            "x = F.grid_sample(x, t1.tanh(), 'nearest', 'zeros', False)",
            "x = x.movedim(2, 3)",
            "x = x.clone(); x.flatten(2).sub_(1)",
        ),
    ),
    "written to a copy, one channel": Chain(
        3, (Input((2, 2, 2, 7), 1, (0, 1, 2, 2), last=True),), ("x = F.silu(x)", "x = x.clone(); x.flatten().mul_(2.0)")
    ),
    "written to a copy, mirrored": Chain(
        3,
        (Input((4, 6, 3, 1), 0, (0, 2, 2, 4)), Input((4, 6, 1, 3), 3, (0, 0, 2, 3))),
        (
            "x = torch.cat([t1, x.mT, x.mT], 3)",
            "x = x.mT",
            "x = x.clone(); z = x; x = x.flip(2); x.mul_(0.5)",
            "x = x.clone(); x.flatten().mul_(-1.5)",
        ),
    ),
    "written to a copy, cropped": Chain(
        2,
        (Input((8, 4, 1, 8), 3, (0, 3, 8), last=True),),
        (
            "x = torch.cat([z, x], 3)",
            "x = x.view(8, 1, 4, 1, 1, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 16)",
            "x = F.pad(x, (0, -2), 'replicate')",
            "x = x.clone(); x.flatten().mul_(0.25)",
        ),
    ),
    "seen through a view of what contiguous() copied": Chain(
        2,
        (Input((2, 8, 2, 1), 2, (0, 1, 2), last=True),),
        ("x = x.contiguous().clone(); z = x.view(-1); x.mul_(-1.5)",),
    ),
    "written to a row of merged blocks": Chain(
        3,
        (Input((3, 5, 4, 8), 3, (0, 3, 6, 8)),),
        ("x = x.reshape(5, 96)", "x = x.clone(); x.select(1, -60).mul_(0.25)"),
    ),
    "written to windows of the rows": Chain(
        4,
        (Input((3, 3, 2, 1), 3, (0, 1, 1, 1, 1)),),
        ("x = x * 1; y = x.unfold(-1, 1, 1).reshape(-1); y.sub_(1); x = x + y.sum()",),
    ),
    "no deviation": Chain(
        2, (Input((1, 3, 1, 8, 4), 0, (0, 1, 1)),), ("x = x.log_softmax(-3)", "x = x.std((0, 3), keepdim=True)")
    ),
    "no deviation, to the bit": Chain(
        3, (Input((6, 7, 2, 4), 0, (0, 1, 2, 6)), Input((1,))), ("x = x.clone(); x.copy_(t1)", "x = x.std(0)")
    ),
    "no deviation of repeated rows": Chain(
        4, (Input((4, 1, 4), 1, (0, 0, 0, 1, 1)),), ("x = x.tile((3, 1))", "x = x.std(-2, keepdim=True) + x")
    ),
    "sharded numbers of places": Chain(
        2,
        (Input((4, 4, 5), 1, (0, 0, 4)), Input((4, 4, 5), 2, (0, 2, 5))),
        ("x = x.index_put((t1.reshape(-1).argsort()[:1] % x.shape[0],), x.new_ones(()))",),
    ),
    "written to a view, mirrored, one row": Chain(
        2,
        (Input((5, 1, 7, 2), 2, (0, 7, 7)), Input((1, 1, 1, 2)), Input((1,))),
        (
            "x = F.conv2d(x, t1, t2, (3, 1), (2, 1), 1, 1)",
            "x = x.flip((2,))",
            "x = x.clone(); x.flatten(1).sub_(1)",
        ),
    ),
    "channels last, gathered from a rank that has none": Chain(
        2,
        (Input((1, 7, 8, 3, 1), 2, (0, 8, 8), last=True), Input((7,)), Input((7,), 0, (0, 4, 7))),
        ("x = F.leaky_relu(x)", "x = F.batch_norm(x, None, None, t1, t2, True)"),
    ),
    "channels last, padded, gathered from a rank that has none": Chain(
        2,
        (Input((4, 3, 2, 3), 1, (0, 0, 3), last=True), Input((3,))),
        (
            "x = F.relu(x * 1, inplace=True)",
            "x = F.pad(x, (-1, -1, 1, 2), 'replicate')",
            "x = F.batch_norm(x, None, None, t1, None, True)",
        ),
    ),
    "statistics of a batch of which a rank has nothing": Chain(
        4, (Input((4, 5, 4), 0, (0, 0, 1, 2, 4)),), ("x = F.batch_norm(x, None, None, None, None, True)",)
    ),
    "written to a row that another rank has": Chain(2, (Input((3,), 0, (0, 0, 3)),), ("x = x.clone(); x[-1] *= 2.0",)),
    "written to a copy, channels last, padded": Chain(
        1,
        (Input((8, 6, 1, 8), 3, (0, 8), last=True),),
        ("x = F.pad(x, (1, -1, -1, 2), 'replicate')", "x = x.clone(); x.flatten().mul_(-1.5)"),
    ),
    "written to what was expanded, one row a rank": Chain(
        3,
        (Input((1, 6, 1), 1, (0, 4, 5, 6)), Input((2, 2, 6, 1))),
        ("x = x * 1; y = x.expand_as(t1).reshape(-1); y.add_(y.mean()); z = y",),
    ),
    "a plain input, a sharded kernel": Chain(
        2,
        (Input((8, 4, 1), 1, (0, 0, 4)), Input((8, 1, 1), 2, (0, 1, 1)), Input((2, 1, 1), 0, (0, 1, 2)), Input((2,))),
        ("x = torch.linalg.vector_norm(x, 3, (1, 2), True)", "x = F.conv1d(x, t2, t3, 1, (1,), (2,), 1)"),
    ),
    "sharded statistics of a norm, given": Chain(
        4,
        (Input((6, 1, 1, 8, 8), 3, (0, 3, 3, 6, 8)), Input((1,), 0, (0, 1, 1, 1, 1)), Input((1,))),
        ("x = F.batch_norm(x, t1.detach(), t2.detach().exp(), None, None)",),
    ),
    "sharded statistics of a plain tensor's norm": Chain(
        4,
        (Input((5,), 0, (0, 0, 0, 1, 5)), Input((1,)), Input((1,), 0, (0, 1, 1, 1, 1))),
        (
            "x = einops.reduce(x, 'a ... -> ...', 'max')",
            "x = x.reshape(1, 1)",
            "x = F.batch_norm(x, t1.detach(), t2.detach().exp())",
        ),
    ),
    "written to a picture that a rank has one column of": Chain(
        4,
        (Input((3, 3, 2, 6), 3, (0, 2, 4, 5, 6)),),
        (
            "x = F.interpolate(x, size=(6, 6), mode='bilinear', align_corners=True, antialias=True)",
            "x = x * 1; y = x.narrow(0, 0, 2).flatten(); y.mul_(2); z = y",
        ),
    ),
    "sharded statistics of a norm, kept": Chain(
        2,
        (Input((2, 3, 6, 5), 2, (0, 4, 6)), Input((3,), 0, (0, 1, 3)), Input((3,))),
        (
            "m = t1.detach().clone(); v = t2.detach().exp(); x = F.batch_norm(x, m, v, None, None, True) + m.view(3, 1, 1)",
        ),
    ),
    "gathered by numbers that are sharded along another dim": Chain(
        2,
        (Input((2, 8, 10), 1, (0, 6, 8)), Input((2, 8, 10), 2, (0, 9, 10))),
        ("x = x.take_along_dim(t1.argsort(2), 2)", "x = x + x.gather(1, t1.argsort(1))"),
    ),
    "resized to the same size by a factor": Chain(
        3,
        (Input((8, 1, 2, 2), 3, (0, 1, 2, 2)),),
        ("x = x.unflatten(-3, (1, -1))", "x = F.interpolate(x, scale_factor=(1.0, 1.3, 1.3), mode='nearest')"),
    ),
    "the memory format of tensors that differ in it, one after the other": Chain(
        2,
        (Input((4, 4, 4, 3, 1), 3, (0, 3, 3), last=True), Input((4, 4, 4, 3, 1))),
        ("x = torch.cat([t1, x, x], -2)", "x = x.clone(); x.flatten(1).sub_(1)"),
    ),
    "copies of rows in blocks that are written to": Chain(
        3,
        (Input((2, 2, 3, 4, 2), 3, (0, 1, 2, 4)),),
        (
            "x = x.reshape(1, -1)",
            "x = x.index_add(1, torch.tensor([3, 90]), x[:, 1:3]).index_copy(1, torch.tensor([5, 7]), x[:, 2:4])",
            "x = x.index_fill(1, torch.tensor([8, 64]), 2.0).masked_fill(x > 1, 0.5)",
            "x = x.scatter(1, torch.tensor([[9, 80]]), x[:, :2]).scatter_add(1, torch.tensor([[1, 95]]), x[:, 4:6])",
            "x = torch.diagonal_scatter(x, x.diagonal() + 1)",
            "x = x.masked_scatter(x > 0.4, x * 2).index_put((torch.tensor([0]), torch.tensor([11])), x[0, :1])",
        ),
    ),
    "a part replaced in a copy of rows in blocks": Chain(
        3,
        (Input((2, 2, 3, 4, 2), 3, (0, 1, 2, 4)),),
        (
            "x = x.reshape(1, -1)",
            "x = x.select_scatter(x.select(0, 0) * 2, 0, 0)",
            "x = x.slice_scatter(x[:, 1:3], 1, 5, 9, 2)",
        ),
    ),
    "a norm of rows in blocks, of which none come along": Chain(
        3,
        (Input((1, 8, 8, 7), 2, (0, 2, 4, 8)), Input((2,)), Input((2,)), Input((1, 2, 2, 1, 112))),
        ("x = x.view(1, 2, 2, 1, 112)", "x = F.group_norm(x, 2, t1, t2)"),
    ),
}


@pytest.mark.parametrize("chain", CASES.values(), ids=CASES)
def test_chain(chain: Chain) -> None:
    compare(chain)
