"""The models, labels and images that people have: read as they mean them, or refused."""

import collections
import copy
import types

import pytest
import torch
import torchvision
from test_bad_input import assert_same, snapshot
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.functional import _get_inverse_affine_matrix

from bld_ext import BLDOptimizer, MultiHead, SeededAugment
from bld_ext.reference import WHITE

# ---- what a model returns ----


class Returns(nn.Module):
    """Two heads, whose logits `form` puts together; without head_sizes unless given."""

    def __init__(self, form, sizes=(2, 3)):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(12, 4)
        self.heads = nn.ModuleList(nn.Linear(4, size) for size in sizes)
        self.form = form

    def forward(self, images):
        features = self.backbone(images.flatten(1))
        return self.form([head(features) for head in self.heads])


def joined(logits):
    return torch.cat(logits, 1)


Output = collections.namedtuple("Output", ["logits", "hidden_states"])
FORMS = {
    "list": list,
    "dict": lambda x: {f"task{i}": head for i, head in enumerate(x)},
    "ordered": lambda x: collections.OrderedDict(enumerate(x)),
}
SINGLE = {
    "tensor": joined,
    "logits": lambda x: types.SimpleNamespace(loss=None, logits=joined(x)),
    "named": lambda x: Output(joined(x), x[0]),
    "segmentation": lambda x: {"out": joined(x), "aux": x[0]},
}


def learned(model, number=3):
    optimizer = BLDOptimizer(model, 0.1, views=2, augment=SeededAugment(jitter=0.1))
    optimizer.seed = 0
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        images = torch.rand(6, 3, 2, 2, generator=generator)
        optimizer.step(images, torch.arange(6) % 2)
    assert any(norms.any() for norms in optimizer.last.distillation_norms)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:BLDOptimizer. the model has no head_sizes")
@pytest.mark.parametrize("form", [*FORMS, *SINGLE])
def test_heads_in_any_form_learn_as_side_by_side(form):
    plain = Returns(joined)
    plain.head_sizes = (2, 3)
    other = Returns((FORMS | SINGLE)[form])
    if form in SINGLE:
        other.head_sizes = (2, 3)
    assert torch.equal(learned(plain), learned(other))


def test_sizes_are_looked_at_again_when_heads_are_added():
    model = Returns(list, sizes=(2,))
    optimizer = BLDOptimizer(model, 0.1)
    images, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 2
    optimizer.step(images, labels)
    assert not optimizer.last.distillation_loss
    model.heads.append(nn.Linear(4, 5))
    optimizer.step(images, labels + 3)
    assert len(optimizer.last.distillation_loss) == 2
    with pytest.raises(ValueError, match="^labels: expected classes of the newest head, 0 to 4"):
        optimizer.step(images, labels + 4)


@pytest.mark.filterwarnings("ignore:BLDOptimizer. the model has no head_sizes")
def test_looking_at_the_sizes_leaves_no_trace():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(), Returns(list))
    optimizer = BLDOptimizer(model, 0.1)
    images, before = torch.rand(6, 12), snapshot(model)
    with pytest.raises(ValueError, match="^labels: expected classes"):
        optimizer.step(images, torch.arange(6))
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (joined, "^model: Returns has no head_sizes, and returns one tensor"),
        (lambda x: None, "^model: expected logits .* got a NoneType. Return"),
        (lambda x: [x[0], "text"], r"^model: expected .* got a list of 0 \(6, 2\)"),
        (lambda x: [x[0], x[1][:3]], r"^model: expected .* 0 \(6, 2\), 1 \(3, 3\)"),
        (lambda x: [*x, x[0].sum()], "^model: expected"),
        (tuple, r"^model: expected .* got a tuple of 0 \(6, 2\), 1 \(6, 3\)"),
    ],
    ids=["one-tensor", "none", "text", "rows", "scalar", "tuple"],
)
def test_another_output_is_refused(form, message):
    model, images = Returns(form), torch.rand(6, 3, 2, 2)
    optimizer, before = BLDOptimizer(model, 0.1), snapshot(model)
    with pytest.raises(ValueError, match=message):
        optimizer.step(images, torch.arange(6) % 2)
    assert_same(snapshot(model), before)


def test_the_sizes_that_were_found_are_told_once(recwarn):
    model, images, labels = Returns(list), torch.rand(6, 3, 2, 2), torch.arange(6) % 2
    optimizer = BLDOptimizer(model, 0.1)
    optimizer.step(images, labels), optimizer.step(images, labels)
    model.heads.append(nn.Linear(4, 2))
    optimizer.step(images, labels)
    (warning,) = recwarn
    assert r"read as heads of [2, 3] classes" in str(warning.message)


@pytest.mark.filterwarnings("ignore:BLDOptimizer. the model has no head_sizes")
def test_heads_that_change_their_order_are_refused():
    order = [0, 1]
    model = Returns(lambda x: [x[i] for i in order])
    images, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 2
    optimizer = BLDOptimizer(model, 0.1)
    optimizer.step(images, labels)
    order.reverse()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^model: expected heads of \[2, 3\] .* got \[3, 2\]"):
        optimizer.step(images, labels)
    assert_same(snapshot(model), before)


# ---- networks with their classifier still on ----


NETWORKS = {
    "resnet18": ("fc", 512),
    "mobilenet_v3_small": ("classifier", 576),
    "densenet121": ("classifier", 1024),
    "swin_t": ("head", 768),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_classifier_of_a_network_is_replaced(name):
    classifier, features = NETWORKS[name]
    network = torchvision.models.get_model(name, num_classes=7)
    with pytest.raises(ValueError, match=rf"MultiHead.replacing\(model, '{classifier}'\)"):
        MultiHead(network)
    model = MultiHead.replacing(network, classifier)
    assert model.in_features == features and f"replaced: {classifier}, " in repr(model)
    model.add_head(2)
    model.eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize("name", ["", "head", "layer1", "avgpool"])
def test_a_name_of_no_classifier_is_refused(name):
    network = torchvision.models.resnet18()
    with pytest.raises(ValueError, match="^name: expected .* such as 'fc', got"):
        MultiHead.replacing(network, name)
    assert isinstance(network.fc, nn.Linear)


def test_features_that_are_not_pooled_have_their_remedy():
    model = MultiHead(nn.Conv2d(3, 8, 3), 8)
    model.add_head(2)
    with pytest.raises(ValueError, match=r"^backbone: .*\(2, 8, 6, 6\)\. Pool them .*nn.Conv2d"):
        model(torch.rand(2, 3, 8, 8))


# ---- labels ----


@pytest.mark.parametrize("ignore_index", [-100, 255])
@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
def test_images_without_a_class_have_no_loss_but_are_distilled(ignore_index, schedule):
    model = MultiHead(nn.Flatten(), 12)
    model.add_head(2), model.add_head(3)
    images, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 3
    labels[[1, 4]] = ignore_index
    before = copy.deepcopy(model)
    optimizer = BLDOptimizer(model, 0.1, ignore_index=ignore_index, schedule=schedule)
    loss = optimizer.step(images, labels)
    known = labels != ignore_index
    expected = F.cross_entropy(before(images)[known, 2:], labels[known], reduction="sum")
    torch.testing.assert_close(loss, expected)

    # the bank holds all images, and the new head saw only those with a class
    model, twin = copy.deepcopy(before), copy.deepcopy(before)
    optimizer = BLDOptimizer(model, 0.1, ignore_index=ignore_index, schedule=schedule)
    optimizer.warm_up(images, labels)
    assert len(optimizer._batch.bank) == 6
    loss = F.cross_entropy(twin(images)[known, 2:], labels[known], reduction="sum")
    loss.backward()
    found = before.heads[1].weight - model.heads[1].weight
    torch.testing.assert_close(found, 1e-3 * twin.heads[1].weight.grad, rtol=1e-4, atol=1e-8)


def test_a_batch_without_any_class_changes_nothing():
    model = MultiHead(nn.Flatten(), 12)
    model.add_head(2), model.add_head(3)
    images = torch.rand(6, 3, 2, 2)
    optimizer, before = BLDOptimizer(model, 0.1), snapshot(model)
    assert optimizer.step(images, torch.full((6,), -100)) == 0
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("label", "ignore_index"), [(-1, -100), (3, -100), (-100, 255), (254, 255)]
)
def test_another_number_than_ignore_index_is_refused(label, ignore_index):
    model = MultiHead(nn.Flatten(), 12)
    model.add_head(3)
    labels = torch.arange(6) % 3
    labels[0], labels[1] = ignore_index, label
    images = torch.rand(6, 3, 2, 2)
    optimizer, before = BLDOptimizer(model, 0.1, ignore_index=ignore_index), snapshot(model)
    with pytest.raises(ValueError, match=f"^labels: expected classes .* labelled {ignore_index};"):
        optimizer.step(images, labels)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("value", [None, 1.5, "255"])
def test_an_ignore_index_that_is_no_number_is_refused(value, make_model):
    with pytest.raises(ValueError, match="^ignore_index: expected a whole number, got"):
        BLDOptimizer(make_model([2]), ignore_index=value)


# ---- masks ----


class Dense(nn.Module):
    head_sizes = (2, 3)

    def __init__(self):
        super().__init__()
        self.layer, self.heads = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

    def forward(self, images):
        return self.heads(self.layer(images))


GEOMETRY = [
    dict(crop_padding=3), dict(flip=0.5), dict(rotation=40), dict(scale=(0.7, 1.3)),
    dict(shear=(20, 10)), dict(translate=(0.2, 0.3)), dict(resized_crop=(0.3, 1)),
    dict(crop_padding=2, flip=0.5, rotation=15, jitter=0.4, erase=0.3),
    dict(rotation=40, padding_mode="reflect"), dict(crop_padding=3, padding_mode="edge"),
]  # fmt: skip
geometries = pytest.mark.parametrize("options", GEOMETRY, ids="-".join)


@geometries
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_masks_move_with_the_pixels(options, dtype):
    """An image whose values are the labels, taken at the nearest pixel, shows its way."""
    masks = torch.randint(1, 200, (4, 9, 12), generator=torch.Generator().manual_seed(0))
    images = masks.unsqueeze(1).to(dtype)
    where = dict(seed=3, step=5, views=range(2, 5), indices=torch.tensor([7, 1, 9, 2]))
    _, moved = SeededAugment(**options)(torch.rand(4, 3, 9, 12), masks=masks, **where)
    shown = {k: v for k, v in options.items() if k not in ("jitter", "erase")}
    as_images = SeededAugment(interpolation="nearest", **shown)(images, **where).squeeze(1)
    as_images = (as_images * WHITE.get(dtype, 1)).round().long()
    assert torch.equal(moved, as_images.masked_fill(as_images == 0, -100))
    assert moved.unique().numel() > 20 and moved.shape == (12, 9, 12)


def test_a_step_on_uint16_images_is_that_on_the_same_float_images(make_model, make_batch):
    """As medical and satellite images come: 65,535 is white."""
    images, labels = make_batch(2)
    deep = (images.int() * 257).to(torch.uint16)
    found = []
    for x in (deep, deep.float() / 65_535):
        torch.manual_seed(0)
        model = make_model()
        augment = SeededAugment(crop_padding=2, flip=0.5, rotation=10, jitter=0.3)
        optimizer = BLDOptimizer(model, 0.1, views=3, views_per_pass=2, augment=augment)
        for _ in range(2):
            model.add_head(2)
            optimizer.step(x, labels)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_views_are_the_same_with_and_without_masks():
    images, augment = torch.rand(4, 3, 9, 12), SeededAugment(rotation=20, jitter=0.3, erase=0.5)
    where = dict(seed=3, step=5, views=range(3))
    masks = torch.zeros(4, 9, 12, dtype=torch.int64)
    assert torch.equal(augment(images, masks=masks, **where)[0], augment(images, **where))


AFFINE = [
    dict(rotation=40), dict(translate=(0.2, 0.3)), dict(shear=(20, 10)), dict(scale=(0.7, 1.3)),
    dict(rotation=15, translate=(0.1, 0.1), scale=(0.8, 1.1), shear=(5, 5)),
]  # fmt: skip


def moved_masks(augment, size=(15, 20)):
    """Each mask, what was drawn for it in a view, and how it moved."""
    masks = torch.randint(200, (3, *size), generator=torch.Generator().manual_seed(0))
    where = dict(seed=1, step=2, views=range(4), indices=torch.arange(3))
    _, moved = augment(torch.rand(3, 3, *size), masks=masks, **where)
    drawn = augment.parameters(size=size, **where)
    for number, found in enumerate(moved):
        at = divmod(number, 3)
        values = type(drawn)(*(field[at].item() for field in drawn))
        yield torchvision.tv_tensors.Mask(masks[at[1]][None]), values, found


@pytest.mark.parametrize("options", AFFINE, ids="-".join)
def test_masks_move_as_torchvision_moves_them(options):
    """Bit for bit, but where two pixels are as near up to the rounding of float32."""
    for mask, drawn, found in moved_masks(SeededAugment(**options)):
        shift, shear = [drawn.translate_x, drawn.translate_y], [drawn.shear_x, drawn.shear_y]
        expected = v2.functional.affine(mask, drawn.angle, shift, drawn.scale, shear, fill=-100)
        inverse = _get_inverse_affine_matrix([0, 0], drawn.angle, shift, drawn.scale, shear)
        matrix = torch.tensor(inverse, dtype=torch.float64).view(2, 3)
        for y, x in (found != expected[0]).nonzero().tolist():
            source = matrix @ torch.tensor([x - 9.5, y - 7.0, 1]).double() + torch.tensor([9.5, 7])
            assert ((source - source.floor() - 0.5).abs() < 1e-5).any()


def test_crops_and_flips_of_masks_are_torchvision_s():
    for mask, drawn, found in moved_masks(SeededAugment(crop_padding=3, flip=0.5)):
        expected = v2.functional.pad(mask, 3, fill=-100)
        expected = v2.functional.crop(expected, drawn.top, drawn.left, 15, 20)
        expected = v2.functional.horizontal_flip(expected) if drawn.flip else expected
        assert torch.equal(found, expected[0])


@geometries
def test_a_dense_network_learns_from_labels_that_moved(options):
    """As from views and masks that were made beforehand, side by side."""
    torch.manual_seed(0)
    model, images = Dense(), torch.rand(4, 3, 9, 12)
    labels = torch.randint(3, (4, 9, 12))
    labels[0, 2] = -100
    twin = copy.deepcopy(model)
    augment = SeededAugment(**options)
    optimizer = BLDOptimizer(model, 1e-3, views=3, augment=augment)
    loss = optimizer.warm_up(images, labels)
    views, moved = augment(
        images, seed=optimizer.seed, step=0, views=range(3), indices=torch.arange(4), masks=labels
    )
    logits = twin(views)
    expected = F.cross_entropy(logits[:, 2:], moved, reduction="sum") / 3
    torch.testing.assert_close(loss, expected)
    expected.backward()
    stepped = twin.layer.weight - 1e-5 * twin.layer.weight.grad
    torch.testing.assert_close(model.layer.weight, stepped, rtol=1e-5, atol=1e-7)
    optimizer.joint(images, labels)
    assert optimizer.last.distillation_norms[0].any()


def test_an_augment_of_one_s_own_moves_masks():
    def flipped(images, *, seed, step, views, indices, masks=None):
        made = images.flip(-1).repeat(len(views), 1, 1, 1)
        return made if masks is None else (made, masks.flip(-1).repeat(len(views), 1, 1))

    images, labels = torch.rand(4, 3, 9, 12), torch.randint(3, (4, 9, 12))
    torch.manual_seed(0)
    model, twin = Dense(), Dense()
    twin.load_state_dict(model.state_dict())
    BLDOptimizer(model, 1e-3, views=2, augment=flipped).step(images, labels)
    BLDOptimizer(twin, 1e-3, views=2).step(images.flip(-1), labels.flip(-1))
    torch.testing.assert_close(model.layer.weight, twin.layer.weight)


@pytest.mark.parametrize("ignore_index", [0, 255])
def test_an_augment_of_one_s_own_pads_with_the_user_s_ignore_index(ignore_index):
    def padded(images, *, seed, step, views, indices, masks=None):
        made = images.roll(2, -1).repeat(len(views), 1, 1, 1)
        moved = masks.roll(2, -1)
        assert (masks == ignore_index).any() and not (masks == -100).any()
        moved[..., :2] = ignore_index
        return made, moved.repeat(len(views), 1, 1)

    images, labels = torch.rand(4, 3, 9, 12), torch.randint(1, 3, (4, 9, 12))
    labels[:, 0] = ignore_index
    model, twin = Dense(), Dense()
    twin.load_state_dict(model.state_dict())
    optimizer = BLDOptimizer(model, 1e-3, augment=padded, views=2, ignore_index=ignore_index)
    loss = optimizer.step(images, labels)
    moved = labels.roll(2, -1)
    moved[..., :2] = ignore_index
    logits = twin(images.roll(2, -1))[:, 2:]
    expected = F.cross_entropy(logits, moved, reduction="sum", ignore_index=ignore_index)
    torch.testing.assert_close(loss, expected)


def test_a_mask_that_is_wrong_stays_wrong():
    masks = torch.full((1, 6, 6), -1)
    where = dict(seed=0, step=0, views=range(2))
    _, moved = SeededAugment(crop_padding=2)(torch.rand(1, 3, 6, 6), masks=masks, **where)
    assert set(moved.unique().tolist()) == {-100, -1}


@pytest.mark.parametrize("wrong", ["alone", "short", "float"])
def test_masks_that_do_not_come_back_are_refused(wrong):
    def augment(images, *, seed, step, views, indices, masks=None):
        made = images.repeat(len(views), 1, 1, 1)
        moved = masks.repeat(len(views), 1, 1)
        return {"alone": made, "short": (made, moved[1:]), "float": (made, moved.float())}[wrong]

    model, images, labels = Dense(), torch.rand(4, 3, 9, 12), torch.randint(3, (4, 9, 12))
    optimizer, before = BLDOptimizer(model, 1e-3, views=2, augment=augment), snapshot(model)
    with pytest.raises(ValueError, match=r"^augment: expected it to return \(views, masks\)"):
        optimizer.step(images, labels)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(4, 9, 12), "^masks: expected torch.int64, got torch.float32; use masks.long"),
        (torch.zeros(4, 3, 4, dtype=torch.int64), r"^masks: expected \[4, 9, 12\], a label for"),
        ([0], "^masks: expected torch.int64, got list"),
    ],
    ids=["dtype", "size", "list"],
)
def test_masks_of_another_kind_are_refused(masks, message):
    augment = SeededAugment(rotation=5)
    with pytest.raises(ValueError, match=message):
        augment(torch.rand(4, 3, 9, 12), seed=0, step=0, views=range(2), masks=masks)


def test_labels_of_another_size_than_the_logits_are_refused():
    model, images = Dense(), torch.rand(4, 3, 9, 12)
    optimizer, before = BLDOptimizer(model, 1e-3), snapshot(model)
    for labels in (torch.zeros(4, 9, 11), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"^labels: expected \[B, 9, 12\], one for each"):
            optimizer.step(images, labels.long())
    assert_same(snapshot(model), before)


# ---- images ----


@pytest.mark.parametrize("augment", [None, SeededAugment(crop_padding=2)], ids=["none", "seeded"])
def test_images_whose_channels_come_last_are_refused(augment):
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = MultiHead(backbone, 4)
    model.add_head(2)
    images = torch.rand(6, 8, 9, 3)
    optimizer, before = BLDOptimizer(model, 0.1, views=2, augment=augment), snapshot(model)
    with pytest.raises(
        ValueError, match=r"^images: .*\(6, 8, 9, 3\).* images.permute\(0, 3, 1, 2\)"
    ):
        optimizer.step(images, torch.arange(6) % 2)
    assert_same(snapshot(model), before)
    optimizer.step(images.permute(0, 3, 1, 2), torch.arange(6) % 2)


def test_a_network_may_take_channels_last_of_all():
    model = MultiHead(nn.Flatten(), 8 * 9 * 3)
    model.add_head(2)
    BLDOptimizer(model, 0.1, views=2).step(torch.rand(6, 8, 9, 3), torch.arange(6) % 2)


# ---- modes ----


def test_a_whole_model_in_eval_mode_is_warned_of_once(recwarn):
    model = MultiHead(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), 12)
    model.add_head(2)
    optimizer = BLDOptimizer(model, 0.1)
    images, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 2
    model.eval()
    for _ in range(2):
        optimizer.step(images, labels)
    (warning,) = recwarn
    assert "the model is in eval mode, in which ViewBatchNorm1d" in str(warning.message)
    assert warning.filename == __file__


def test_single_modules_in_eval_mode_and_models_without_modes_are_not_warned_of(recwarn):
    images, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 2
    model = MultiHead(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), 12)
    model.add_head(2)
    model.backbone[1].eval()
    BLDOptimizer(model, 0.1).step(images, labels)
    model = MultiHead(nn.Flatten(), 12)
    model.add_head(2)
    model.eval()
    BLDOptimizer(model, 0.1).step(images, labels)
    assert not recwarn


# ---- forms of step ----


def test_a_closure_gives_the_batch(make_model, make_batch):
    batch, found = make_batch(3), []
    for call in ("plain", "first", "named"):
        torch.manual_seed(0)
        optimizer = BLDOptimizer(make_model([2, 3]), 0.1)
        if call == "plain":
            loss = optimizer.step(*batch)
        elif call == "first":
            loss = optimizer.step(lambda: batch)
        else:
            loss = optimizer.step(closure=lambda: list(batch))
        found.append([loss, *(p.detach() for p in optimizer.model.parameters())])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([lambda: torch.zeros(())], "closure that returned a Tensor"),
        ([lambda: None], "closure that returned a NoneType"),
        ([torch.zeros(3)], "got a Tensor alone"),
    ],
    ids=["loss", "none", "images"],
)
def test_what_is_no_batch_is_refused(arguments, message, make_model):
    optimizer = BLDOptimizer(make_model([2]), 0.1)
    with pytest.raises(TypeError, match=f"^step: expected .*{message}"):
        optimizer.step(*arguments)


def test_a_batch_and_a_closure_are_refused(make_model, make_batch):
    optimizer, batch = BLDOptimizer(make_model([2]), 0.1), make_batch(2)
    with pytest.raises(TypeError, match="^step: expected .* got both"):
        optimizer.step(*batch, closure=lambda: batch)


def test_without_arguments_only_at_gradients_of_zero(make_model):
    model = make_model([2])
    with pytest.warns(UserWarning, match="keeps state"):
        optimizer = BLDOptimizer(model, 0.1, base=torch.optim.Adam)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert len(optimizer.state) == len([*model.parameters()])
    model.heads[0].bias.grad += 1
    with pytest.raises(RuntimeError, match="^step: expected step.* backward"):
        optimizer.step()
    assert_same(model.state_dict(), before)


def test_a_gradient_scaler_is_told_that_it_is_not_needed(make_model, make_batch):
    model = make_model([2])
    batch, scaler = make_batch(2), torch.amp.GradScaler("cpu")
    optimizer, before = BLDOptimizer(model, 0.1), snapshot(model)
    scaler.scale(torch.ones(()))  # as of a loss
    with pytest.raises(TypeError, match=r"^BLDOptimizer: .*GradScaler.*step\(images, labels\)"):
        scaler.step(optimizer, *batch)
    assert_same(snapshot(model), before)
