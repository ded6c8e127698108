//! A set of tensors as one vector on the host, tensor after tensor: what algorithms work on that know no device.

use crate::backend::{Buffer, Train};
use crate::error::{Result, ensure};
use crate::model::Param;

/// The values of all.
pub(crate) fn values<'p, B: Train>(be: &B, params: impl Iterator<Item = &'p Param<B>>) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for p in params {
        all.extend(p.to_host(be)?);
    }
    Ok(all)
}

/// Sets the values of all.
///
/// # Errors
/// `Shape` for another number of values; the device's.
pub(crate) fn set_values<'p, B: Train>(
    be: &B,
    params: impl Iterator<Item = &'p mut Param<B>>,
    values: &[f32],
) -> Result<()> {
    split(params, values, |p, own| be.upload_acc(p.w.head_mut(own.len()), own))
}

/// The gradients of all; 0 for what is frozen.
pub(crate) fn gradients<'p, B: Train>(be: &B, params: impl Iterator<Item = &'p Param<B>>) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for p in params {
        let at = all.len();
        all.resize(at + p.len(), 0.0);
        if let Some(g) = &p.g {
            be.download_acc(g.head(p.len()), &mut all[at..])?;
        }
    }
    Ok(all)
}

/// Replaces the gradients of what is not frozen.
///
/// # Errors
/// As [`set_values`].
pub(crate) fn set_gradients<'p, B: Train>(
    be: &B,
    params: impl Iterator<Item = &'p mut Param<B>>,
    values: &[f32],
) -> Result<()> {
    split(params, values, |p, own| match &mut p.g {
        Some(g) => be.upload_acc(g.head_mut(own.len()), own),
        None => Ok(()),
    })
}

/// Forgets the gradients.
pub(crate) fn clear<'p, B: Train>(be: &B, mut params: impl Iterator<Item = &'p mut Param<B>>) -> Result<()> {
    params.try_for_each(|p| {
        let n = p.len();
        p.g.as_mut().map_or(Ok(()), |g| be.zero(g.head_mut(n)))
    })
}

/// Calls `each` with every tensor and its part of `all`.
pub(super) fn split<'p, B: Train>(
    params: impl Iterator<Item = &'p mut Param<B>>,
    all: &[f32],
    mut each: impl FnMut(&mut Param<B>, &[f32]) -> Result<()>,
) -> Result<()> {
    let params: Vec<&mut Param<B>> = params.collect();
    let n: usize = params.iter().map(|p| p.len()).sum();
    ensure!(all.len() == n, Shape, "{} values for {n}", all.len());
    let mut rest = all;
    for p in params {
        let (own, others) = rest.split_at(p.len());
        each(p, own)?;
        rest = others;
    }
    Ok(())
}
