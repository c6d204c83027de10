"""What every column of our tables holds: its type, unit, sign and meaning, stated once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from halfmap.errors import TableError
from halfmap.units import UNITS

COLUMN_UNITS: tuple[str, ...] = (*UNITS, "µm", "rad", "1/px", "1/Å²", "Å³")
"""Units a column may state; ``none`` says that it has none."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Parameters
    ----------
    name : str
        Label without the leading underscore: RELION's own, or ours with the prefix ``hm``.
    dtype : type
        ``str``, ``int``, ``float`` or ``bool`` (written as 0 and 1).
    unit : str
        One of `COLUMN_UNITS`.
    meaning : str
        What it says, with sign and origin where they matter.
    table : str
        ``optics`` if it belongs to the optics groups, ``rows`` otherwise.
    vector : bool
        Whether the text is a vector, ``[a,b,c]``; see `parse_vector`.
    """

    name: str
    dtype: type[str] | type[int] | type[float] | type[bool]
    unit: str
    meaning: str
    table: Literal["optics", "rows"] = "rows"
    vector: bool = False


# One column a line: label, type, unit, meaning.
_OPTICS = """
rlnOpticsGroup int none number of the optics group, from 1; also in the rows, where it refers to the group
rlnOpticsGroupName str none name of the optics group, kept when groups are renumbered
rlnVoltage float kV acceleration voltage
rlnSphericalAberration float mm spherical aberration Cs
rlnChromaticAberration float mm chromatic aberration Cc
rlnAmplitudeContrast float none amplitude contrast as a fraction, 0.1 for 10 %
rlnMicrographOriginalPixelSize float Å/px pixel size of the movie as recorded, before binning
rlnMicrographPixelSize float Å/px pixel size of the motion-corrected micrograph
rlnImagePixelSize float Å/px pixel size of the extracted particle images
rlnImageSize int px box size of the extracted particle images
rlnImageDimensionality int none 2 for images, 3 for sub-tomograms
rlnMtfFileName str none STAR file with the detector's modulation transfer function
rlnBeamTiltX float mrad beam tilt along x
rlnBeamTiltY float mrad beam tilt along y
rlnOddZernike vector rad coefficients of the antisymmetric aberrations, Zernike polynomials of k in 1/Å
rlnEvenZernike vector rad coefficients of the symmetric aberrations, Zernike polynomials of k in 1/Å
rlnMagMat00 float none anisotropic magnification M (true k = M k of the image), x from x
rlnMagMat01 float none anisotropic magnification: x from y
rlnMagMat10 float none anisotropic magnification: y from x
rlnMagMat11 float none anisotropic magnification: y from y
rlnCtfDataArePhaseFlipped bool none 1 if the images have been phase flipped already
rlnCtfDataAreCtfPremultiplied bool none 1 if the images have been multiplied by their CTF already
rlnEERUpsampling int none EER up-sampling: 1 physical pixels, 2 super-resolution
rlnEERGrouping int none hardware frames of an EER movie summed into one
rlnMagnification float none magnification at the detector (RELION 3.0)
rlnDetectorPixelSize float µm pixel size of the detector (RELION 3.0); over the magnification: the image's
rlnBeamTiltClass int none beam tilt class (RELION 3.0's forerunner of the optics group)
hmSignalScale float none factor between the simulated images and the projected potential in V times voxels
hmFlippedY bool none 1 if poses, defocus angles and coordinates were mirrored in y when they were imported
hmContrastSign int none 1 if particles are bright in their stack, -1 if they are dark
hmTrefoil vector Å cryoSPARC's ctf/trefoil_A as it was; its scale against rlnOddZernike is not published
hmTetrafoil vector Å cryoSPARC's ctf/tetra_A as it was; its scale against rlnEvenZernike is not published
hmPhaseRamp vector Å cryoSPARC's ctf/shift_A as it was; a shift of the image that goes with its beam tilt
"""

_MICROGRAPHS = """
rlnMicrographMovieName str none movie file
rlnMicrographName str none motion-corrected micrograph
rlnMicrographNameNoDW str none micrograph summed without dose weighting
rlnMicrographNameEven str none micrograph summed from even frames
rlnMicrographNameOdd str none micrograph summed from odd frames
hmMicrographNameDenoised str none denoised micrograph, on the scale of the sum without dose weighting
hmImageKind str none micrographs that particles were cut from: raw, denoised or merged
hmIsNormalised bool none whether images were divided by the standard deviation of their background
hmMicrographNameMerged str none micrograph of denoised low and raw high frequencies, on the same scale
hmDenoisingPowers str none file with the powers of a micrograph's halves before and after denoising
hmSnrRaw float none power of the signal over that of the noise in a micrograph, all frequencies together
hmSnrDenoised float none the same of the denoised micrograph, bias left aside, of the signal that it has left
hmHalvesCorrelation float none correlation of a micrograph's even and odd sum where there is hardly any signal
hmNoiseReduction float none power of the noise before denoising over that after, all frequencies together
hmSignalToNoiseAndBias float none power of the signal over that of noise and bias in the denoised micrograph
hmSignalTransfer float none amplitude of the signal after denoising over that before
hmSignalPower float none power of the signal in a ring, in units of the normalised halves
hmSignalPowerError float none its standard error
hmNoisePowerRaw float none power of the noise in a ring of the mean of the raw halves
hmNoisePowerRawError float none its standard error
hmNoisePowerDenoised float none the same of the denoised halves
hmNoisePowerDenoisedError float none its standard error
hmBiasPower float none mean squared difference in a ring of the signal and what denoised halves have in common
hmBiasPowerError float none its standard error
hmSignalTransferError float none standard error of the transfer
hmSsnrRaw float none FRC / (1 - FRC) of the raw halves in a ring
hmSsnrDenoised float none the same of the denoised halves, which bias raises
hmSsnrChange float none what denoising changes it by
hmSsnrChangeError float none standard error of that
hmDefocusDifference float Å mean defocus found in the denoised micrograph less that found in the raw one
hmMergedResolution float Å where the merged micrograph goes over from the denoised to the raw one
rlnMicrographMetadata str none STAR file with the micrograph's motion tracks
rlnImageSizeX int px columns of a movie's frames or a micrograph
rlnImageSizeY int px rows of a movie's frames or a micrograph
rlnImageSizeZ int none frames of a movie
hmContents str none sum of size, beginning and end of the imported file, by which another one is noticed
rlnMicrographCoordinates str none file with the coordinates picked in the micrograph
rlnMicrographId int none number of the micrograph
rlnMicrographGainName str none gain reference, multiplied
rlnMicrographDefectFile str none list or map of the detector's defects
rlnMicrographBinning float none micrograph pixel size over movie pixel size
rlnMicrographDoseRate float e/Å² dose of one frame
rlnMicrographPreExposure float e/Å² dose before the first frame
rlnMicrographStartFrame int none first frame used, from 1
rlnMicrographEndFrame int none last frame used, from 1
rlnMicrographFrameNumber int none frame, from 1
rlnMicrographShiftX float px shift of a frame along x, in unbinned pixels
rlnMicrographShiftY float px shift of a frame along y, in unbinned pixels
hmShiftError float px standard error of a frame's shift along one axis, in unbinned pixels
rlnMotionModelVersion int none 0: global shifts only; 1: RELION's third-order polynomial
rlnMotionModelCoeffsIdx int none index of a motion model coefficient, from 0
rlnMotionModelCoeff float none coefficient of the motion model
rlnAccumMotionTotal float Å length of the track over all frames
rlnAccumMotionEarly float Å length of the track over the first 4 e/Å²
rlnAccumMotionLate float Å length of the track after the first 4 e/Å²
hmLocalMotion float Å root mean square over field and frames of the motion against the whole field's
hmMotionUncertainty float Å mean standard error of the shifts along one axis
hmMotionMisfit float none scatter of patches about the motion model over what noise explains, 1 = all
hmFrameCorrelation float none peaks of the correlations of pairs of frames over their noise
hmBadPixels int none pixels found bad in the movie and replaced
hmPicks int none particles picked in the micrograph
hmPicksFalse float none how many of these are false on average
hmMicrographMask str none mask of the micrograph, 1 where the specimen is good, of any pixel size
hmMicrographMaskedFraction float none fraction of the micrograph that is masked
hmMaskedBy str none what is masked and how much, nothing if nothing was found
hmCoarseContrast float none standard deviation of the specimen's darkness, blurred to 140 Å
hmMicrographMean float none mean of the micrograph's pixels
hmMicrographStd float none standard deviation of the micrograph's pixels
rlnMicrographTiltAngle float ° stage tilt
rlnMicrographTiltAxisDirection float ° direction of the tilt axis in the image
rlnMicrographIceThickness float Å ice thickness
"""

_CTF = """
rlnCtfImage str none picture of the CTF fit
rlnCtfPowerSpectrum str none power spectrum that the CTF is fitted to
rlnDefocusU float Å larger defocus, positive = underfocus
rlnDefocusV float Å smaller defocus, positive = underfocus
rlnDefocusAngle float ° angle from the x axis to the direction of rlnDefocusU
rlnCtfAstigmatism float Å absolute difference of the two defoci
rlnPhaseShift float ° phase shift of a phase plate
rlnCtfFigureOfMerit float none correlation of the CTF model with the spectrum
rlnCtfMaxResolution float Å finest resolution to which Thon rings are fitted
rlnCtfIceRingDensity float none power in the ice ring, 0.25 to 0.28 1/Å
rlnCtfValidationScore float none validation score of the CTF fit
rlnCtfBfactor float Å² B-factor of the envelope, exp(-B k² / 4), positive = fall-off
rlnCtfScalefactor float none factor on the CTF
rlnCtfValue float none value of the CTF
hmDefocusUUncertainty float Å standard error of rlnDefocusU
hmDefocusVUncertainty float Å standard error of rlnDefocusV
hmDefocusAngleUncertainty float ° standard error of rlnDefocusAngle, 52 if it is unknown
hmPhaseShiftUncertainty float ° standard error of rlnPhaseShift
hmTiltUncertainty float ° standard error of rlnMicrographTiltAngle
hmTiltAxisUncertainty float ° standard error of rlnMicrographTiltAxisDirection, 104 if it is unknown
hmDefocusSurface vector Å change of the defocus over the field: factors of x, y, x² - 1/3, x y, y² - 1/3
hmDefocusSurfaceUncertainty vector Å standard errors of hmDefocusSurface, 0 for terms that were not fitted
hmCtfMisfit float none scatter of the tiles' own defoci over what noise explains, 1 = all
hmCtfSignificance float none strength of the Thon rings over its standard error; below 10 they may be noise
hmIceThicknessRelative float none ice thicker than in the brightest micrographs, in mean free paths
hmCtfFitResolution float Å finest resolution of the rings that were fitted
hmCtfAnisotropy float none change of the rings' strength with direction over its mean, 0 to 1
hmCtfAnisotropyUncertainty float none standard error of hmCtfAnisotropy
hmCtfAnisotropyAngle float ° direction from x in which the rings are weakest, 0 to 180
hmCtfCs float mm spherical aberration at which the rings fit best
hmCtfCsUncertainty float mm standard error of hmCtfCs
hmCtfIceThickness float Å thickness of the ice along the beam by the nodes of the rings, nan if none shows
hmCtfIceThicknessUncertainty float Å standard error of hmCtfIceThickness
hmCtfProblem str none why the CTF is not to be trusted, none if nothing was found
"""

_PARTICLES = """
rlnImageName str none particle image, index@stack with the index from 1
rlnImageOriginalName str none name of the image before it was extracted or subtracted anew
rlnReconstructImageName str none image to be used for the reconstruction alone
rlnImageId int none number of the image
rlnParticleName str none name of the particle
rlnOriginalParticleName str none first name of the particle
rlnParticleId int none number of the particle
rlnCoordinateX float px x of the particle's centre in the micrograph, 0 at the first stored pixel
rlnCoordinateY float px y of the particle's centre in the micrograph, 0 at the first stored row
rlnCoordinateZ float px z of the particle's centre in a tomogram
rlnAngleRot float ° first Euler angle (ZYZ)
rlnAngleTilt float ° second Euler angle (ZYZ)
rlnAnglePsi float ° third Euler angle (ZYZ), in the plane of the image
rlnAngleRotPrior float ° centre of the prior on rot
rlnAngleTiltPrior float ° centre of the prior on tilt
rlnAnglePsiPrior float ° centre of the prior on psi
rlnAngleRotFlipRatio float none 0: ordinary prior on rot; 0.5: both directions equal
rlnAnglePsiFlipRatio float none 0: ordinary prior on psi; 0.5: both directions equal
rlnAnglePsiFlip bool none 1 if the prior on psi has been turned by 180°
rlnOriginXAngst float Å shift along x to apply to the image to centre it
rlnOriginYAngst float Å shift along y to apply to the image to centre it
rlnOriginZAngst float Å shift along z to apply to a sub-tomogram to centre it
rlnOriginXPriorAngst float Å centre of the prior on rlnOriginXAngst
rlnOriginYPriorAngst float Å centre of the prior on rlnOriginYAngst
rlnOriginX float px shift along x to apply to the image to centre it (RELION 3.0)
rlnOriginY float px shift along y to apply to the image to centre it (RELION 3.0)
rlnOriginXPrior float px centre of the prior on rlnOriginX (RELION 3.0)
rlnOriginYPrior float px centre of the prior on rlnOriginY (RELION 3.0)
rlnClassNumber int none class, from 1; 0 or -1 if none was assigned
rlnRandomSubset int none half set, 1 or 2; the two never mix
rlnGroupNumber int none group of particles with one intensity scale, from 1
rlnGroupName str none name of that group
rlnNormCorrection float none factor that the image is divided by to have the average intensity
rlnLogLikeliContribution float none the particle's part of the log-likelihood
rlnMaxValueProbDistribution float none largest posterior probability of a pose
hmClassProbability float none posterior probability of the particle's class
hmPosteriorEntropy float none entropy of the posterior over classes and poses, in nats
hmDifferenceCorrelation float none correlation of halves, in a shell, of what a class has more than all
hmVariationAgreement float none correlation of what two halves of the particles differ in most
hmAnglePsiError float ° standard deviation of the angle in the plane, about the best pose
hmAngleViewError float ° standard deviation of the viewing direction along an axis, about the best pose
hmOriginError float Å standard deviation of the shift along an axis, about the best pose
rlnNrOfSignificantSamples int none poses that hold 99.9 % of the posterior in the first pass
rlnNrOfFrames int none movie frames of the particle
rlnAutopickFigureOfMerit float none score of the picker, larger = better
rlnParticleFigureOfMerit float none score of the particle
rlnParticleSelectZScore float none sum of z-scores, larger = more likely an outlier
rlnSamplingRate float Å/px pixel size of the image (before RELION 3.1)
rlnHelicalTubeID int none helical tube that the segment was cut from
rlnHelicalTubePitch float Å cross-over distance of the helix
rlnHelicalTrackLength float px distance from the start of the tube (RELION 3.0)
rlnHelicalTrackLengthAngst float Å distance from the start of the tube
hmCryosparcUid str none cryoSPARC's uid of the item, an unsigned 64-bit integer as text
hmMicrographHeight int px rows of the micrograph that the coordinates refer to
hmMicrographWidth int px columns of the micrograph that the coordinates refer to
hmPoseUncertainty float ° standard deviation of the particle's orientation
hmShiftUncertainty float Å standard deviation of the particle's shift along one axis
hmDefocusUncertainty float Å standard deviation of the mean defocus
hmParticleKind str none simulated particle: real, overlapping another one, or broken
hmDepth float Å simulated height along the ice's normal, positive where the underfocus is greater
hmIceThickness float Å simulated thickness of the ice where the particle is
hmBackgroundMean float none mean of a particle's image around the particle before it was normalised
hmBackgroundStd float none standard deviation of the image there, before it was normalised
hmParticleMean float none mean of a particle's image within the circle that the background is outside of
hmParticleStd float none standard deviation of the image there
hmParticleSkewness float none skewness of the image there
hmParticleZScore float none largest distance of these three from their medians, in robust standard deviations
hmParticleScore float none probability that the particle is whole, single and no contaminant, 0 to 1
hmParticleDiameter float Å longest diameter of the particle, as picked or simulated
hmPickProbability float none probability that the pick is a particle
hmPickAgreement int none number of pickers that have the pick
hmContaminant str none kind of a simulated contaminant
hmRadius float Å radius of a simulated contaminant
hmMotionFile str none file with a movie's true motion
hmTau float e/Å² exposure over which a part of a simulated motion fades
hmWaveX float 1/Å wave vector of a simulated deformation along x
hmWaveY float 1/Å wave vector of a simulated deformation along y
hmWavePhase float rad phase of a simulated deformation at the centre of the first pixel
hmMotionX float Å displacement of the specimen along x
hmMotionY float Å displacement of the specimen along y
"""

_MODELS = """
rlnReferenceImage str none map or class average
rlnClassDistribution float none fraction of the particles in the class
hmNrParticles int none particles in the class
rlnClassIndex int none number of the class in the model file
rlnClassScore float none predicted quality of a class average, 0 to 1
rlnPredictedClassScore float none predicted quality of a class average, 0 to 1
hmGoodLost float none expected share of the good particles that a selection rejects
rlnClassPriorOffsetX float px prior of the class on the shift along x
rlnClassPriorOffsetY float px prior of the class on the shift along y
rlnEstimatedResolution float Å estimated resolution of a reference
rlnCurrentResolution float Å resolution of the refinement now
hmMapDiameter float Å diameter of the sphere about the box's centre that holds the map's density
rlnCurrentImageSize int px size of the images used now
rlnOriginalImageSize int px box size of the particles
rlnPixelSize float Å/px pixel size of the references
rlnReferenceDimensionality int none 2 for class averages, 3 for maps
rlnDataDimensionality int none 2 for images, 3 for sub-tomograms
rlnNrClasses int none number of references
rlnNrGroups int none number of groups with an intensity scale of their own
rlnNrOpticsGroups int none number of optics groups
rlnGroupNrParticles int none particles in the group
rlnGroupScaleCorrection float none intensity scale of the group
rlnOpticsGroupNumber int none number of the optics group
rlnOpticsGroupNrParticles int none particles in the optics group
rlnTau2FudgeFactor float none regularisation parameter T
rlnPaddingFactor float none padding of the references' Fourier transforms
rlnSigmaOffsetsAngst float Å standard deviation of the prior on shifts
rlnAveragePmax float none average of rlnMaxValueProbDistribution
rlnLogLikelihood float none log-likelihood of the model
rlnAccuracyRotations float ° estimated accuracy of the orientations
rlnAccuracyTranslationsAngst float Å estimated accuracy of the shifts
rlnSsnrMap float none spectral signal-to-noise ratio of the map
rlnSigma2Noise float none noise power of the images in a Fourier shell
rlnReferenceSigma2 float none noise power of the reference in a Fourier shell
rlnReferenceTau2 float none signal power of the reference in a Fourier shell
rlnFourierCompleteness float none fraction of Fourier components with SNR > 1
rlnOverallFourierCompleteness float none fraction of components with SNR > 1 up to the resolution
rlnSymmetryGroup str none point group
hmVerdict str none whether a map has a point group: yes, contained (in the one it has), nearly, no
hmGroupOrder int none operators of a point group
hmCorrelation float none mean correlation of a map with itself under the operators of a point group
hmWeakestCorrelation float none the same of the class of operators with the lowest
hmShareOfSignal float none that in parts of what the map's noise leaves between equal parts
hmSearchCorrelation float none mean correlation in the first search, at low resolution
hmNullCorrelation float none mean of the same in maps of random phases
hmNullStd float none and its standard deviation
hmSignalCorrelation float none correlation that the noise of a map leaves between equal parts
hmComparedResolution float Å finest detail that was compared
hmCentreX float Å where the axes meet, from the centre of the box
hmCentreY float Å where the axes meet, from the centre of the box
hmCentreZ float Å where the axes meet, from the centre of the box
rlnMaskName str none mask, 0 to 1
hmRun int none run from random poses
hmRunKept int none whether the maps are of this run, among others
hmRunAgreement float Å resolution to which a run agrees best with another
hmRunOverChance float none correlation of a run with another over that of random rotations, at most 1
hmRunEvidence float none mean log-evidence of particles that are the same for all runs
hmRunCorrelation float none mean correlation of the runs that were kept, in a Fourier shell
"""

_SPECTRA = """
rlnSpectralIndex int none Fourier shell: distance from the origin in Fourier pixels of the box
rlnResolution float 1/Å spatial frequency
rlnAngstromResolution float Å resolution, 1 / rlnResolution
rlnResolutionInversePixel float 1/px spatial frequency, 0.5 at Nyquist
rlnResolutionSquared float 1/Å² square of the spatial frequency
rlnMtfValue float none modulation transfer function of the detector, 0 to 1
rlnGoldStandardFsc float none Fourier shell correlation of the two half maps
rlnFourierShellCorrelation float none Fourier shell correlation
rlnFourierShellCorrelationCorrected float none FSC corrected by phase randomisation
rlnFourierShellCorrelationMaskedMaps float none FSC of the masked half maps
rlnFourierShellCorrelationUnmaskedMaps float none FSC of the half maps without a mask
rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps float none FSC after phase randomisation, masked
hmViewEvenness float none squared correlation with the truth that unevenly seen directions leave, at most
rlnFinalResolution float Å resolution at FSC = 0.143
hmResolutionFine float Å fine end of the interval that the resolution at FSC = 0.143 truly is in
hmResolutionCoarse float Å coarse end of this interval
hmResolutionHalf float Å resolution at FSC = 0.5
hmResolutionHalfFine float Å fine end of the interval that the resolution at FSC = 0.5 truly is in
hmResolutionHalfCoarse float Å coarse end of this interval
hmConfidence float % probability of the intervals
hmIndependentShare float none Fourier coefficients that are independent within the mask, over all
hmBfactorError float Å² standard deviation of the fitted B-factor
hmLocalMethod str none how a local resolution was measured: correlation, monogenic, best or worst direction
hmLocalMedian float Å median of the local resolution within the mask
hmLocalQuantile05 float Å resolution than which 5 % of the voxels within the mask are finer
hmLocalQuantile25 float Å resolution than which 25 % of these are finer
hmLocalQuantile75 float Å resolution than which 75 % of these are finer
hmLocalQuantile95 float Å resolution than which 95 % of these are finer
hmLocalNeverLost float none share of the voxels within the mask that are known to the last shell
hmLocalUnresolved float none share of the voxels within the mask that are lost in the first band
hmLocalFinest float Å local resolution that voxels have which are never lost
hmLocalCoarsest float Å local resolution that voxels have which are lost in the first band
hmLocalThreshold float none local correlation at which the local resolution is read off
hmNoiseConfidence float % part of the noise's amplitudes that a map's must exceed
hmVoxelsCorrelation int none voxels of a local resolution by correlation, within the mask
hmVoxelsMonogenic int none voxels of a local resolution by the monogenic signal over noise, within the mask
hmResolutionFrom float Å fine end of a histogram's bin
hmResolutionTo float Å coarse end of a histogram's bin
hmAxisX float none direction of an axis along x, of length 1
hmAxisY float none direction of an axis along y, of length 1
hmAxisZ float none direction of an axis along z, of length 1
hmFirstMap str none first of two maps that are compared
hmSecondMap str none second of two maps that are compared
hmMapCorrelation float none correlation of two maps within the mask, filtered alike
hmLocalWindow float Å standard deviation of the window that two maps are correlated in
hmLocalCorrelationMedian float none median of the correlation in this window within the mask
hmDifferenceSigma float none standard deviation of the difference of two maps, on the grey scale of the first
hmDifferenceNoise str none where that was measured: outside or inside the mask, or of half maps (halves)
hmDifferenceLimit float none standard deviations from which on a difference is listed
hmAmplitudeFactor float none what brings the second map's amplitudes to those of the first
hmTurnedBy float ° angle that the second map was turned by
hmShiftX float Å way that the second map was moved along x, after it was turned
hmShiftY float Å way that the second map was moved along y
hmShiftZ float Å way that the second map was moved along z
hmMirrored int none whether a map was inverted through its origin, which changes its hand
hmHand str none which helices fit a map better: right, left or either; or why none: too few, too coarse
hmHelixPlaces int none places of a map that hold a helix, copies by its symmetry counted once
hmRightHanded int none those of them that right-handed helices fit better
hmAlignedCorrelation float none correlation of two maps after alignment, all frequencies compared alike
hmChanceCorrelation float none what the same search finds between maps with only their outline in common
hmOtherHandCorrelation float none correlation after alignment of the hand that was not taken
hmRegionX float Å middle along x of a region where two maps differ, by the first map's header
hmRegionY float Å middle along y of such a region
hmRegionZ float Å middle along z of such a region
hmRegionVolume float Å³ volume of such a region
hmRegionMean float none mean difference in it in standard deviations, above 0 where the first map is denser
hmRegionPeak float none greatest difference in it
hmMapName str none map that a model is in
hmModelName str none file of the atomic model
hmFitSearch str none where the model could go: none, local or global
hmFitMoved float Å root mean square of the ways of a model's atoms
hmMapModelResolution float Å resolution at FSC = 0.143 of map and model within the mask
hmMapModelResolutionHalf float Å resolution at FSC = 0.5 of map and model within the mask
hmMapModelResolutionUnmasked float Å resolution at FSC = 0.143 of map and model without a mask
hmMapModelResolutionHalfUnmasked float Å resolution at FSC = 0.5 of map and model without a mask
hmResolutionSource str none how the resolution of a map is known
hmPlaceCorrelation float none correlation of a model's density with the map's, where the model would be
hmPlaceAngle float ° turn about its centre that brings a model to a place
hmPlaceShift float Å shift of its centre that brings a model to a place
hmPlaceMatrix vector none three rows of four numbers, rotation and shift in Å, that bring a model to a place
hmChain str none chain of an atomic model
hmResidueName str none name of a residue
hmResidueNumber int none number of a residue
hmInsertionCode str none letter after the number of a residue
hmAtomName str none name of an atom in its residue
hmAtomX float Å position of an atom along x, in the model's coordinates
hmAtomY float Å position of an atom along y
hmAtomZ float Å position of an atom along z
hmAtoms int none number of atoms, without hydrogens
hmAtomsOutside int none atoms outside the map, which have no scores
hmQScore float none Q-score, or its mean over atoms; 1 is a well resolved atom
hmQScoreExpected float none mean Q-score of residues of the kind in maps of this resolution
hmQScoreSigma float Å width of the Gaussian of Q-scores
hmMapModelCorrelation float none correlation of the map with the model's about the atoms of a residue
hmFscQ float Å local resolution of map and model less that of the half maps, above 0 where they disagree
hmFscQRelative float none the same over the local resolution of the half maps
hmMapModelLocalResolution float Å detail to which map and model agree around the atoms of a residue
hmHalfMapsLocalResolution float Å detail to which half maps agree around the atoms of a residue
rlnLowPassUsed float Å resolution to which the map is filtered
rlnFourierShellCorrelationParticleMaskFraction float none unmasked FSC, corrected for the mask's volume
rlnRandomiseFrom float Å resolution beyond which phases are randomised
rlnBfactorUsedForSharpening float Å² B-factor applied to the map, negative = sharpened
rlnFittedSlopeGuinierPlot float Å² slope of the line fitted to the Guinier plot
rlnFittedInterceptGuinierPlot float none intercept of the line fitted to the Guinier plot
rlnCorrelationFitGuinierPlot float none correlation of the line with the Guinier plot
rlnLogAmplitudesOriginal float none logarithm of the map's amplitude
rlnLogAmplitudesMTFCorrected float none logarithm of the amplitude over the MTF
rlnLogAmplitudesWeighted float none logarithm of the FSC-weighted amplitude
rlnLogAmplitudesSharpened float none logarithm of the sharpened amplitude
rlnLogAmplitudesIntercept float none fitted plateau of the logarithm of the amplitude
rlnMolecularWeight float kDa mass of the ordered part
rlnUnfilteredMapHalf1 str none unfiltered half map 1
rlnUnfilteredMapHalf2 str none unfiltered half map 2
rlnPostprocessedMap str none sharpened map
rlnPostprocessedMapMasked str none sharpened map inside its mask
"""

_PROJECT = """
rlnPipeLineJobCounter int none number of the next job
rlnPipeLineNodeName str none file that a job wrote or read
rlnPipeLineNodeType int none type of the file (before RELION 4)
rlnPipeLineNodeTypeLabel str none type of the file
rlnPipeLineNodeTypeLabelDepth int none levels of the type that make folders under .Nodes
rlnPipeLineProcessName str none folder of the job
rlnPipeLineProcessAlias str none alias of the job, None if it has none
rlnPipeLineProcessType int none type of the job (before RELION 4)
rlnPipeLineProcessTypeLabel str none type of the job
rlnPipeLineProcessStatus int none status of the job (before RELION 4)
rlnPipeLineProcessStatusLabel str none status of the job
rlnPipeLineEdgeFromNode str none file that a job reads
rlnPipeLineEdgeToNode str none file that a job wrote
rlnPipeLineEdgeProcess str none job of the edge
rlnJobType int none type of the job (before RELION 4)
rlnJobTypeLabel str none type of the job
rlnJobIsContinue bool none 1 if the job continues an earlier one
rlnJobIsTomo bool none 1 if the job is of the tomography pipeline
rlnJobOptionVariable str none name of a parameter
rlnJobOptionValue str none value of a parameter, as text
hmItem str none item of a step that failed
hmReason str none why it failed
rlnSelected int none 1 if the item is selected, 0 if not
rlnComment str none free text about the item
"""

_DTYPES: dict[str, type] = {"str": str, "vector": str, "int": int, "float": float, "bool": bool}


def _parse(text: str, table: Literal["optics", "rows"]) -> list[Column]:
    columns = []
    for line in filter(None, text.splitlines()):
        name, dtype, unit, meaning = line.split(maxsplit=3)
        columns.append(Column(name, _DTYPES[dtype], unit, meaning, table=table, vector=dtype == "vector"))
    return columns


_ROWS = _MICROGRAPHS + _CTF + _PARTICLES + _MODELS + _SPECTRA + _PROJECT

COLUMNS: dict[str, Column] = {
    column.name: column for column in _parse(_OPTICS, "optics") + _parse(_ROWS, "rows")
}
"""Every column that Halfmap knows, by label; others survive, with a type inferred from their values."""

OPTICS_COLUMNS: tuple[str, ...] = tuple(name for name, column in COLUMNS.items() if column.table == "optics")
"""Labels that belong to the optics table."""


def parse_vector(text: str, *, label: str = "the vector", row: int | None = None) -> list[float]:
    """Numbers of a vector that is written ``[a,b,c]``.

    Raises
    ------
    TableError
        If the text is not a vector of finite numbers.

    Examples
    --------
    >>> parse_vector("[0.5,-1,2e-3]")
    [0.5, -1.0, 0.002]
    """
    try:
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError
        values = [float(part) for part in text[1:-1].split(",") if part.strip()]
        if not all(math.isfinite(value) for value in values):
            raise ValueError
    except ValueError:
        raise TableError(f"{label} is {text!r}, which is not a vector like [0.1,0,-2]", row=row) from None
    return values


def format_vector(values: Iterable[float]) -> str:
    """Write numbers as ``[a,b,c]``, the way RELION stores a vector in one column.

    Examples
    --------
    >>> format_vector([0.5, -1, 2e-3])
    '[0.5,-1,0.002]'
    """
    return "[" + ",".join(f"{value!r}".removesuffix(".0") for value in map(float, values)) + "]"
