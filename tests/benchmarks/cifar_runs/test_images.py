import torch

from cifar_runs.images import TrainingImages, normalised, read


def test_reads_the_first_images_with_their_labels(write_images):
    data = read(write_images(), train_images=12)
    assert data['train_images'].shape == (12, 32, 32, 3) and data['test_images'].shape == (10, 32, 32, 3)
    for split in ('train', 'test'):
        expected = 25. * data[f'{split}_labels']
        torch.testing.assert_close(data[f'{split}_images'].float().mean((1, 2, 3)), expected, atol=2, rtol=0)


def test_an_epoch_has_every_image_once_with_its_label_and_cropped(write_images):
    data = read(write_images())
    images = TrainingImages(data, 4, 'cpu', seed=0)
    batches, again = list(images), list(TrainingImages(data, 4, 'cpu', seed=0))
    assert len(images) == len(batches) == 4
    seen = torch.cat([labels for _, labels in batches])
    assert sorted(seen.tolist()) == sorted(data['train_labels'].tolist()) != seen.tolist()
    inside = torch.cat([batch[:, :, 4:-4, 4:-4] for batch, _ in batches])  # no crop has its margin of zeros there
    expected = normalised((25 * seen).view(-1, 1, 1, 1).expand(-1, 24, 24, 3))
    torch.testing.assert_close(inside, expected, atol=0.05, rtol=0)
    of_the_margin = normalised(torch.zeros(1, 32, 32, 3)) == torch.cat([batch for batch, _ in batches])
    assert 0.2 < of_the_margin[:, :, 0, 16].float().mean() < 0.8  # the first row is above the image in 4 of 9 crops
    assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, again, strict=True))
