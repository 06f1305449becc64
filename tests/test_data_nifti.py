"""Patients of NIfTI volumes are found and read in one orientation; what is wrong with a file is said by its name."""

import builtins
import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from heterodiff.data.decoding import nifti
from heterodiff.data.decoding.nifti import LAYOUTS, Layout, find_patients, read_patient, read_voxels
from heterodiff.errors import DataError

SHAPE = (6, 7, 5)
TWO = Layout({"flair": "*_flair", "t1": "*_t1"}, "*_seg")


def voxels(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def write(path: Path, content: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(content, np.eye(4) if affine is None else affine), path)
    return path


def patient(root: Path, name: str = "p1", mask: bool = True, **files: np.ndarray) -> Path:
    folder = root / name
    contents = {"flair": voxels(0), "t1": voxels(1)} | ({"seg": lesion()} if mask else {}) | files
    for kind, content in contents.items():
        write(folder / f"{name}_{kind}.nii.gz", content)
    return folder


def lesion() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 2:5, 2] = [[1, 2, 4]] * 2
    return mask


# --- finding -----------------------------------------------------------------------------------


def test_patients_are_folders_of_volumes(tmp_path: Path) -> None:
    patient(tmp_path, "b")
    patient(tmp_path / "site1", "a", mask=False)
    (tmp_path / "notes.txt").write_text("no volume")
    (tmp_path / "b" / "._b_t1.nii.gz").write_text("left by another system")
    found = find_patients(tmp_path, TWO)
    assert [one.name for one in found] == ["b", "site1/a"]
    assert [path.name for path in found[0].volumes] == ["b_flair.nii.gz", "b_t1.nii.gz"]
    assert found[0].mask == tmp_path / "b" / "b_seg.nii.gz"
    assert found[1].mask is None


def test_layouts_tell_t1_from_t1ce(tmp_path: Path) -> None:
    for kind in ("flair", "t1", "t1ce", "t2", "seg"):
        write(tmp_path / "BraTS_001" / f"BraTS_001_{kind}.nii.gz", voxels())
    (found,) = find_patients(tmp_path, LAYOUTS["brats"])
    assert [path.name[10:-7] for path in found.volumes] == ["flair", "t1", "t1ce", "t2"]
    assert found.mask is not None
    for kind in ("space-MNI_T1w", "space-MNI_label_mask"):
        write(tmp_path / "atlas" / "sub-1" / "anat" / f"sub-1_{kind}.nii.gz", voxels())
    (found,) = find_patients(tmp_path / "atlas", LAYOUTS["atlas"])
    assert len(found.volumes) == 1
    assert found.mask is not None


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no \.nii.*expected one folder per patient with \*_flair\.nii\[\.gz\] \(flair\)"
    ):
        find_patients(tmp_path, TWO)


def test_a_missing_modality_is_named_with_what_is_there(tmp_path: Path) -> None:
    (patient(tmp_path) / "p1_t1.nii.gz").unlink()
    with pytest.raises(
        DataError, match=r"p1: modality t1 is missing: expected one \*_t1\.nii\[\.gz\], found p1_flair\.nii\.gz"
    ):
        find_patients(tmp_path, TWO)


def test_a_modality_may_not_be_there_twice(tmp_path: Path) -> None:
    write(patient(tmp_path) / "again_t1.nii", voxels())
    with pytest.raises(DataError, match="2 files of modality t1"):
        find_patients(tmp_path, TWO)


def test_a_patient_may_not_be_there_twice(tmp_path: Path) -> None:
    patient(tmp_path / "site1")
    patient(tmp_path / "site2", "P1")
    with pytest.raises(DataError, match="patient P1 is there twice, as site1/p1 and site2/P1; rename or remove one"):
        find_patients(tmp_path, TWO)


def scan(root: Path, name: str, session: str) -> None:
    for kind in ("T1w", "mask"):
        write(root / session / "anat" / f"{name}_{kind}.nii.gz", voxels())


def test_scans_of_a_patient_belong_together(tmp_path: Path) -> None:
    """As in ATLAS v2.0: each scan has a name of its own, and says whose it is."""
    scan(tmp_path / "R001" / "sub-r001s001", "sub-r001s001", "ses-1")
    scan(tmp_path / "R001" / "sub-r001s001", "sub-r001s001", "ses-2")
    scan(tmp_path / "R002" / "sub-r002s001", "sub-r002s001", "ses-1")
    found = find_patients(tmp_path, LAYOUTS["atlas"])
    assert [one.name for one in found] == ["sub-r001s001/ses-1", "sub-r001s001/ses-2", "sub-r002s001/ses-1"]
    assert [one.patient for one in found] == ["sub-r001s001", "sub-r001s001", "sub-r002s001"]


def test_without_sub_folders_each_folder_is_a_patient(tmp_path: Path) -> None:
    patient(tmp_path, "b")
    patient(tmp_path / "site1", "a")
    assert [one.patient for one in find_patients(tmp_path, TWO)] == ["b", "site1/a"]


def test_a_scan_may_not_be_there_twice(tmp_path: Path) -> None:
    scan(tmp_path / "raw" / "sub-1", "sub-1", "ses-1")
    scan(tmp_path / "copy" / "sub-1", "sub-1", "ses-1")
    message = "patient sub-1/ses-1 is there twice, as copy/sub-1/ses-1/anat and raw/sub-1/ses-1/anat; rename"
    with pytest.raises(DataError, match=message):
        find_patients(tmp_path, LAYOUTS["atlas"])


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    patient(tmp_path / "elsewhere", "b")
    patient(tmp_path / "data", "a")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere" / "b")  # the same patient by another name
    assert [one.name for one in find_patients(tmp_path / "data", TWO)] == ["a", "b"]


def test_a_mask_may_be_missing_but_not_there_twice(tmp_path: Path) -> None:
    folder = patient(tmp_path, mask=False)
    assert find_patients(tmp_path, TWO)[0].mask is None
    for kind in ("a_seg", "b_seg"):
        write(folder / f"{kind}.nii.gz", voxels())
    with pytest.raises(DataError, match=r"expected one mask \*_seg\.nii\[\.gz\], found a_seg\.nii\.gz, b_seg\.nii\.gz"):
        find_patients(tmp_path, TWO)


# --- reading -----------------------------------------------------------------------------------

OBLIQUE = nibabel.affines.from_matvec(
    np.array([[0.98, -0.17, 0.05], [0.17, 0.98, 0.1], [-0.06, -0.1, 0.99]]) * [1.0, 1.2, 3.0], [-40, 10, 5]
)
AFFINES = {
    "RAS": np.diag([1.0, 1.2, 3.0, 1.0]),
    "LPS": np.diag([-1.0, -1.2, 3.0, 1.0]),
    "oblique": OBLIQUE,
    "axes changed": np.array([[0, 0, 3.0, 0], [-1.0, 0, 0, 5], [0, 1.2, 0, 0], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", AFFINES)
def test_volumes_come_in_one_orientation(tmp_path: Path, name: str) -> None:
    """Every voxel is where the affine says, and its axes run to the right, to the front and up."""
    content, affine = voxels(), AFFINES[name]
    found, new_affine = read_voxels(write(tmp_path / "a.nii.gz", content, affine))
    assert nibabel.aff2axcodes(new_affine) == ("R", "A", "S")
    for place in np.ndindex(*SHAPE):
        world = affine @ [*place, 1]
        index = np.rint(np.linalg.solve(new_affine, world)[:3]).astype(int)
        assert found[tuple(index)] == content[place]


def test_a_patient_is_read_whole(tmp_path: Path) -> None:
    patient(tmp_path)
    found = read_patient(find_patients(tmp_path, TWO)[0])
    np.testing.assert_array_equal(found.image, np.stack([voxels(0), voxels(1)]))
    np.testing.assert_array_equal(found.mask, lesion() > 0)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64])
def test_number_types_and_a_last_axis_of_one(tmp_path: Path, dtype: Any) -> None:
    content = voxels().clip(0, 200).astype(dtype)
    found, _ = read_voxels(write(tmp_path / "a.nii", content[..., None]))
    np.testing.assert_allclose(found, content)


def with_header(path: Path, header: nibabel.Nifti1Header) -> bytes:
    """The file with another header, as nibabel would not write it."""
    content = gzip.decompress(path.read_bytes())
    return gzip.compress(header.binaryblock + content[len(header.binaryblock) :])


def broken(root: Path, how: str) -> None:
    folder = patient(root)
    t1 = folder / "p1_t1.nii.gz"
    content = voxels(1)
    if how == "shape":
        write(t1, voxels(1, (6, 7, 6)))
    elif how == "affine":
        write(t1, content, np.diag([1, 1, 1.5, 1]))
    elif how == "four axes":
        write(t1, voxels(1, (*SHAPE, 3)))
    elif how in ("nan", "inf"):
        content[1, 2, 3] = float(how)
        write(t1, content)
    elif how == "empty":
        write(t1, np.zeros(SHAPE, np.float32))
    elif how == "z-scored":
        inside = content > 90
        write(t1, np.where(inside, (content - content[inside].mean()) / content[inside].std(), 0))
    elif how == "negative mask":
        write(folder / "p1_seg.nii.gz", -lesion().astype(np.int16))
    elif how in ("zeros", "no number"):
        file = nibabel.load(t1)
        for key in ("srow_x", "srow_y", "srow_z"):
            file.header[key] = 0 if how == "zeros" else np.nan
        t1.write_bytes(with_header(t1, file.header))
    elif how == "mask":
        write(folder / "p1_seg.nii.gz", lesion() * 0.3)
    elif how == "truncated":
        t1.write_bytes(t1.read_bytes()[:-80])
    elif how == "no gzip":
        t1.write_bytes(b"hello")
    elif how == "no nifti":
        t1.write_bytes(gzip.compress(b"hello" * 200))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"p1_t1\.nii\.gz: 6x7x6 voxels, but p1_flair\.nii\.gz has 6x7x5; register"),
        ("affine", r"p1_t1\.nii\.gz: its affine differs from that of p1_flair\.nii\.gz by 0\.5 mm; register"),
        ("four axes", r"p1_t1\.nii\.gz: expected a volume of 3 axes, found 4 \(6x7x5x3\)"),
        ("nan", r"p1_t1\.nii\.gz: 1 voxels are NaN or infinite"),
        ("inf", r"p1_t1\.nii\.gz: 1 voxels are NaN or infinite"),
        ("empty", r"p1_t1\.nii\.gz: an empty volume, every voxel is 0"),
        (
            "z-scored",
            r"p1_t1\.nii\.gz: [2-4]\d% of its voxels are below 0, as after z-scoring.*use the volumes from before",
        ),
        ("mask", r"p1_seg\.nii\.gz: a mask has whole numbers from 0 up, found 0\.3"),
        ("negative mask", r"p1_seg\.nii\.gz: a mask has whole numbers from 0 up, found -1"),
        ("zeros", r"p1_t1\.nii\.gz: its affine cannot be used.*found \[\[0\.0, .*correct sform or qform"),
        ("no number", r"p1_t1\.nii\.gz: its affine cannot be used.*found \[\[nan, .*correct sform or qform"),
        ("truncated", r"p1_t1\.nii\.gz: cannot be read to its end"),
        ("no gzip", r"p1_t1\.nii\.gz: not a NIfTI file that can be read"),
        ("no nifti", r"p1_t1\.nii\.gz: not a NIfTI file that can be read"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, how: str, message: str) -> None:
    broken(tmp_path, how)
    (found,) = find_patients(tmp_path, TWO)
    with pytest.raises(DataError, match=message):
        read_patient(found)


def test_little_below_0_is_no_error(tmp_path: Path) -> None:
    """Interpolation undershoots around edges: many voxels, but hardly any of the intensity."""
    content = voxels(1)
    content[:3] = -2
    patient(tmp_path, t1=content)
    read_patient(find_patients(tmp_path, TWO)[0])


def test_without_nibabel_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.nii", voxels())
    imported = builtins.__import__

    def refuse(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "nibabel":
            raise ImportError(name)
        return imported(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"needs nibabel: pip install 'heterodiff\[mri\]'"):
        read_voxels(path)


def test_a_real_patient(real_data: Path) -> None:
    ending = "_N4_noneck_reduced_winsor_regtoFLAIR"
    modalities = {"flair": f"FLAIR{ending}_brain_N4_regtoMNI", "t1": f"T1{ending}_brain_N4_regtoMNI"}
    layout = Layout(modalities, f"GOLD_STANDARD{ending}_regtoMNI")
    (files,) = find_patients(real_data / "ms_lesion_nifti", layout)
    found = read_patient(files)
    assert found.image.shape == (2, 182, 218, 182)
    assert found.mask is not None
    brain = found.image[0] > 0
    assert 0.1 < brain.mean() < 0.4
    assert found.mask[brain].sum() > 0.99 * found.mask.sum()
    assert found.image[0][found.mask].mean() > 1.2 * found.image[0][brain].mean()


# --- sizes -------------------------------------------------------------------------------------


def test_sizes_that_no_file_holds_are_refused_by_the_header(tmp_path: Path) -> None:
    """A header alone declares a thousand million voxels; zeros do fill a thousandth of them."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((1000, 1000, 1000))
    header["vox_offset"] = 352
    content = header.binaryblock + bytes(4)
    for name, zeros in {"header.nii.gz": 0, "some.nii.gz": 10**6}.items():
        (tmp_path / name).write_bytes(gzip.compress(content + bytes(zeros)))
        tracemalloc.start()
        with pytest.raises(DataError, match=rf"{name}: its header declares 1000x1000x1000 voxels, which its .* bytes"):
            read_voxels(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 1e7
        tracemalloc.stop()


def test_more_voxels_than_any_scanner_makes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti, "MAX_VOXELS", 999)
    nibabel.save(nibabel.Nifti1Image(np.ones((10, 10, 10), np.uint8), np.eye(4)), tmp_path / "large.nii.gz")
    with pytest.raises(DataError, match=r"large\.nii\.gz: 10x10x10 voxels, at most 999 are read; resample or crop"):
        read_voxels(tmp_path / "large.nii.gz")
